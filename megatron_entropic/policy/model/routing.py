"""Routing of an optimizer step's tokens: load of the experts of all layers, and the auxiliary loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_entropic.policy.batch.microbatch import MicroBatch
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.policy.model.router_replay import collect_choices, storage_dtype

if TYPE_CHECKING:
    from megatron_entropic.policy.model.router import PolicyRouter


def has_experts(model: torch.nn.ModuleList) -> bool:
    """Whether some layer of the whole model has experts."""
    config: Any = model[0].config
    return bool(config.num_moe_experts)


class Routing:
    """The routers of this rank's stage. Its methods are called by all ranks together.

    Args:
        model: the chunks of this rank's stage, wrapped or not, of a model with experts.
    """

    def __init__(self, model: torch.nn.ModuleList, parallel: ParallelState) -> None:
        # Imports megatron-core, which the platform must have prepared for.
        from megatron_entropic.policy.model.router import PolicyRouter

        self._routers: list[PolicyRouter] = [m for m in model.modules() if isinstance(m, PolicyRouter)]
        self._parallel = parallel
        self._config: Any = model[0].config
        self._device = next(model.parameters()).device
        self._recorded: dict[int, list[torch.Tensor]] = {}

    def begin_step(self, batch: list[MicroBatch]) -> None:
        """Start counting; `batch` holds all micro-batches of this replica's part of the coming step."""
        # Under context parallelism a micro-batch holds this rank's part.
        tokens = torch.tensor(sum(b.tokens.numel() for b in batch), dtype=torch.int64, device=self._device)
        dist.all_reduce(tokens, group=self._parallel.data_context_group)
        for router in self._routers:
            router.begin_step(int(tokens))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the experts of all tokens while the block runs, for `recorded`."""
        for router in self._routers:
            router.recorded = []
        try:
            yield
        finally:
            for router in self._routers:
                self._recorded[router.place] = router.recorded or []
                router.recorded = None

    def recorded(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        """Experts recorded last, in a pass over `micro_batches`: `Sequence.experts` of each sequence, on every rank."""
        shape = (sum(self._config.moe_layer_freq), self._config.moe_router_topk)
        dtype = storage_dtype(self._config.num_moe_experts)
        recorded, self._recorded = self._recorded, {}
        return collect_choices(recorded, micro_batches, self._parallel, self._device, shape, dtype)

    def metrics(self) -> dict[str, float]:
        """Metrics of the step, the same on all ranks.

        moe/max_load is the number of tokens of a layer's busiest expert over the mean of its experts, averaged over
        layers (1: balanced); moe/max_load_worst_layer is that of the worst layer; moe/idle_experts is the fraction of
        experts without a token; moe/aux_loss, where it is on, is the mean auxiliary loss of a layer (1: balanced);
        moe/replay_differs, with router replay, is the fraction of choices that the current weights would not have made.
        """
        counts = torch.zeros(
            self._config.num_layers, self._config.num_moe_experts + 1, dtype=torch.float64, device=self._device
        )
        for router in self._routers:
            tokens, aux_loss = router.counted()
            counts[router.layer_number - 1, :-1] = tokens
            counts[router.layer_number - 1, -1] = aux_loss
        # Every token of a layer was counted by one rank.
        dist.all_reduce(counts)
        counts = counts[torch.tensor(self._config.moe_layer_freq, dtype=torch.bool)]
        load = counts[:, :-1]
        busiest = load.amax(dim=1) / load.mean(dim=1)
        found = {
            "moe/max_load": float(busiest.mean()),
            "moe/max_load_worst_layer": float(busiest.max()),
            "moe/idle_experts": float((load == 0).double().mean()),
        }
        if self._config.moe_aux_loss_coeff:
            found["moe/aux_loss"] = float(counts[:, -1].mean())
        return found | self._replay_metrics()

    def _replay_metrics(self) -> dict[str, float]:
        replayed = torch.zeros(2, dtype=torch.int64, device=self._device)
        for router in self._routers:
            replayed += router.replayed()
        dist.all_reduce(replayed)
        differing, choices = replayed.tolist()
        return {"moe/replay_differs": differing / choices} if choices else {}
