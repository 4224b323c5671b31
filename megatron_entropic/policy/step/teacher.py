"""The teacher of a distillation by loss: a frozen model's hidden states for the micro-batches of one optimizer step.

    micro-batches --forward without gradients--> hidden states at response tokens [r, H'] --> host memory
    a micro-batch's forward and backward <-- its hidden states, and the teacher's output layer

One pass before the step and not one within each micro-batch, because stages of the teacher are on different ranks. Only
hidden states are kept, since logits over the vocabulary are what nobody has room for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_entropic.policy.batch.microbatch import MicroBatch
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.policy.model.outputs import OutputOptions, TokenStatistics
from megatron_entropic.policy.step.forward import run_forward

Places = tuple[int, ...]
"""Indices of a micro-batch's sequences in the caller's list, which no other micro-batch of the step has."""


class TeacherStates:
    """Hidden states of one optimizer step under the teacher, on the last stage; elsewhere none.

    Args:
        teacher: the chunks of this rank's pipeline stage of the teacher, on the device.
        batch: micro-batches of the step; every rank of the replica calls with the same.
        parallel: this rank's place.
    """

    def __init__(self, teacher: torch.nn.ModuleList, batch: list[MicroBatch], parallel: ParallelState) -> None:
        self._device = next(teacher.parameters()).device
        # Experts that the policy's routers chose say nothing to the teacher's.
        own = [replace(micro_batch, choices=None) for micro_batch in batch]
        # In pinned memory they would be there sooner, and micro-batches of one step are of many sizes.
        collected = run_forward(teacher, own, _to_host, OutputOptions(hidden=True))
        self._states: dict[Places, torch.Tensor] = dict(collected)
        self._weight: torch.Tensor | None = None
        if parallel.is_last_stage:
            last: Any = teacher[-1]
            self._weight = last.output_weight().detach()

    @property
    def weight(self) -> torch.Tensor:
        """Weight of the teacher's output layer, [V/tp, H']; on the last stage."""
        assert self._weight is not None, "only the last stage has an output layer"
        return self._weight

    def of(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Hidden states at this rank's targets of a micro-batch of the step, [r, H'], on the device."""
        return self._states[micro_batch.indices].to(self._device, non_blocking=True)


def _to_host(micro_batch: MicroBatch, statistics: TokenStatistics) -> tuple[Places, torch.Tensor]:
    assert statistics.hidden is not None
    return micro_batch.indices, statistics.hidden.cpu()
