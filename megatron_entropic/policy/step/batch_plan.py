"""Plans of policy losses that compare tokens over a whole optimizer step, such as Clip-Cov: marks for each token.

    sequences --forward without gradients--> log-probs, entropies --plan, reduced over replicas--> marks [R] a sequence

Only last stages know log-probs, so only they plan; the loss is computed there too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.algorithms.losses import BatchTokens, PolicyLoss
from megatron_entropic.config.algorithm import AlgorithmConfig
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.types import Scores, Sequence

Marks = list[Tensor]


class AcrossReplicas:
    """Reductions (`algorithms.losses.Across`) over ranks that hold different sequences; all of them call it together.

    Context-parallel ranks hold the same ones: the first of them counts.

    Args:
        parallel: this rank's place, on the last stage.
        device: device of the collectives.
    """

    def __init__(self, parallel: ParallelState, device: torch.device) -> None:
        self._parallel = parallel
        self._device = device

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sums of [k] float64."""
        total = values.to(self._device, copy=True)
        if self._parallel.context_rank:
            total.zero_()
        dist.all_reduce(total, group=self._parallel.data_context_group)
        return total

    def largest(self, values: Tensor, count: int) -> Tensor:
        """The `count` largest of all replicas' values; every replica sends its own largest."""
        own = torch.full((count,), -torch.inf, dtype=torch.float64, device=self._device)
        if self._parallel.context_rank == 0:
            best = values.double().topk(min(count, values.numel())).values
            own[: best.numel()] = best.to(self._device)
        ranks = self._parallel.data_size * self._parallel.context_size
        gathered = [torch.empty_like(own) for _ in range(ranks)]
        dist.all_gather(gathered, own, group=self._parallel.data_context_group)
        return torch.cat(gathered).topk(count).values


def plan_marks(
    sequences: list[Sequence],
    loss: PolicyLoss,
    algorithm: AlgorithmConfig,
    score: Callable[[], Scores | None],
    parallel: ParallelState,
    device: torch.device,
    optimizer_step: int,
) -> Marks | None:
    """Marks of each sequence for a loss with a plan; None for other losses, and on stages that compute no loss.

    Args:
        sequences: this replica's; may be empty.
        score: a forward pass over them under the weights before the step; all ranks of the replica run it.
        optimizer_step: number of the step, so that draws differ from step to step.
    """
    if loss.plan is None:
        return None
    scores = score() if sequences else Scores([], [])
    if not parallel.is_last_stage:
        return None
    assert scores is not None
    tokens = BatchTokens(
        logprobs=_joined(scores.logprobs),
        entropies=_joined(scores.entropies),
        old_logprobs=_joined([s.old_logprobs for s in sequences if s.old_logprobs is not None]),
        advantages=_joined([s.advantages for s in sequences if s.advantages is not None]),
        keys=torch.cat([torch.zeros(0, dtype=torch.float64), *(_keys(s, optimizer_step) for s in sequences)]),
    )
    marks = loss.plan(tokens, AcrossReplicas(parallel, device), algorithm)
    return list(marks.split([sequence.response_length for sequence in sequences]))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0), *(part.float().cpu() for part in parts)])


def _keys(sequence: Sequence, optimizer_step: int) -> Tensor:
    """Random numbers [R] that depend on the sequence's tokens and the step, not on where the sequence lies."""
    seed = zlib.crc32(sequence.tokens.long().cpu().numpy().tobytes(), optimizer_step)
    return torch.rand(sequence.response_length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
