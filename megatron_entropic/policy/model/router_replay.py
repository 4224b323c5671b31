"""Router replay: the experts that the score pass chose are used again by the update, and by its recomputation.

    score    routers --record--> [t, k] of a layer and micro-batch --all ranks of a replica--> [L, layers, k] a sequence
    update   sequences --pack, cut--> choices [t, layers, k] of a micro-batch --PackedSegments--> routers --replay

Old and new log-probs of a token then come from the same experts, and their ratio moves with the weights alone, not with
a router that crossed a threshold (Zheng et al. 2025, "Group Sequence Policy Optimization", section 5.3).

Choices follow the token: they are laid out by the micro-batch that carries them, so packing, context cut, sequence
parallelism, stages and replicas may differ between the passes. Shapes: t tokens of this rank's part of a micro-batch, L
of a sequence, `layers` those of the whole model that have experts, k experts a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_entropic.errors import UserError
from megatron_entropic.policy.batch.host_copies import to_device
from megatron_entropic.policy.batch.microbatch import MicroBatch
from megatron_entropic.policy.megatron.parallel import ParallelState

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def storage_dtype(num_experts: int) -> torch.dtype:
    """The smallest dtype for numbers of experts and `no_choice`."""
    return torch.uint8 if num_experts <= torch.iinfo(torch.uint8).max else torch.int16


def no_choice(dtype: torch.dtype) -> int:
    """Number that stands for the experts of a token that chooses for itself: padding."""
    return torch.iinfo(dtype).max


class ReplayedChoice:
    """One router's choice of experts, in the place of megatron-core's RouterReplay.

    megatron-core's own replays what was set last, in the order of calls; under recomputation it has to be told of every
    pass. This one looks at the micro-batch that runs.
    """

    def __init__(self) -> None:
        self.choices: torch.Tensor | None = None
        """Choices of the micro-batch that runs, [t, k]; None: the router chooses."""
        self.chosen = torch.empty(0, 0, dtype=torch.int64)
        """Experts chosen in the last call, [t, k] int64."""
        self.differing: torch.Tensor | None = None
        """Replayed choices of the last call that a router would not have made, and all; [2] int64. None: no replay."""

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts with the interface of torch.topk over scores [t, experts].

        Returns values, with gradient, and experts, both [t, k]. Replayed experts are sorted by score, as topk's are, so
        that sums over them round alike.
        """
        if self.choices is None:
            values, self.chosen = default_compute_topk(scores, topk, num_groups, group_topk)
            self.differing = None
            return values, self.chosen
        _, own = default_compute_topk(scores.detach(), topk, num_groups, group_topk)
        replayed = self.choices[:, :1] != no_choice(self.choices.dtype)
        experts = torch.where(replayed, self.choices.long(), own)
        values, order = scores.gather(1, experts).sort(dim=1, descending=True, stable=True)
        self.chosen = experts.gather(1, order)
        unlike = (experts.unsqueeze(2) != own.unsqueeze(1)).all(dim=2) & replayed
        self.differing = torch.stack([unlike.sum(), replayed.sum() * topk])
        return values, self.chosen


def check_hook() -> None:
    """Refuse a megatron-core whose routers cannot be told what to choose.

    Raises:
        UserError: it lacks the hook.
    """
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    if "router_replay" not in inspect.signature(topk_routing_with_score_function).parameters:
        raise UserError(
            "policy.moe_router_replay needs a megatron-core whose routers take `router_replay`, such as 0.16.1"
        )


def take_choices(layer: Any, _arguments: Any, options: dict[str, Any]) -> None:
    """Hand a router the choices of this micro-batch before its layer with experts runs, also again in backward."""
    router, choices = layer.mlp.router, options["packed_seq_params"].choices
    router.choice.choices = None if choices is None else choices[:, router.place]


def with_choices(micro_batch: MicroBatch, parallel: ParallelState) -> MicroBatch:
    """Lay out the experts of a micro-batch's sequences for this rank; returns the micro-batch with them.

    Raises:
        ValueError: a sequence without `experts`.
    """
    if not micro_batch.sequences:
        return micro_batch
    experts = [sequence.experts for sequence in micro_batch.sequences if sequence.experts is not None]
    if len(experts) < len(micro_batch.sequences):
        raise ValueError("router replay: a sequence lacks the experts that the score pass chose")
    first = experts[0]
    # Padding has no choice.
    whole = first.new_full((_tokens(micro_batch), *first.shape[1:]), no_choice(first.dtype))
    for start, of_sequence in zip(micro_batch.cu_seqlens.tolist(), experts, strict=False):
        whole[start : start + of_sequence.shape[0]] = of_sequence
    return replace(micro_batch, choices=whole[_own_rows(micro_batch, parallel)])


def collect_choices(
    recorded: dict[int, list[torch.Tensor]],
    micro_batches: list[MicroBatch],
    parallel: ParallelState,
    device: torch.device,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Collect the choices that all routers of a replica recorded in a pass; called by all its ranks together.

    Args:
        recorded: choices of this rank, by layer with experts (from 0, over the whole model): [t, k] of each
            micro-batch.
        micro_batches: micro-batches of the pass, in its order.
        device: device of the process groups.
        shape: (layers, k).
        dtype: dtype of the choices.

    Returns:
        [L, layers, k] on the CPU for each sequence, in the order of the sequences given to `pack`, on every rank.
    """
    found: dict[int, torch.Tensor] = {}
    for number, micro_batch in enumerate(micro_batches):
        whole = torch.zeros(_tokens(micro_batch), *shape, dtype=dtype, device=device)
        rows = to_device(_own_rows(micro_batch, parallel), device)
        for place, of_layer in recorded.items():
            whole[rows, place] = to_device(of_layer[number], device)
        # Each element comes from one rank; as bytes, because backends do not add 16-bit integers.
        for group in (parallel.context_group, parallel.model_group):
            dist.all_reduce(whole.view(torch.uint8), group=group)
        whole = whole.cpu()
        starts = micro_batch.cu_seqlens.tolist()
        for index, sequence, start in zip(micro_batch.indices, micro_batch.sequences, starts, strict=False):
            found[index] = whole[start : start + sequence.tokens.numel()].clone()
    return [found[index] for index in sorted(found)]


def _tokens(micro_batch: MicroBatch) -> int:
    """Number of tokens of all context-parallel ranks, padding included."""
    return int(micro_batch.cu_seqlens[-1])


def _own_rows(micro_batch: MicroBatch, parallel: ParallelState) -> torch.Tensor:
    """Rows of the whole micro-batch that this rank's routers see, in their order, [t] int64."""
    rows = parallel.packing.cut.rows(micro_batch.cu_seqlens.diff().long())
    # With experts, tensor ranks share out the tokens between them (sequence parallelism).
    return rows.chunk(parallel.tensor_size)[parallel.tensor_rank]
