"""Requests to the model's last stage and its results. Apart from the head, which imports megatron-core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from megatron_entropic.policy.batch.microbatch import MicroBatch
from megatron_entropic.tensor_parallel import TokenLoss

HeadName = Literal["logits", "recompute", "fused_loss"]


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's side of a divergence: its output layer, and what its last layer left behind."""

    weight: torch.Tensor
    """Weight of the teacher's output layer, [V/tp, H']."""
    hidden: Callable[[MicroBatch], torch.Tensor]
    """Function: micro-batch -> the teacher's hidden states at this rank's targets, [r, H']."""
    loss: Callable[[MicroBatch], Callable[[torch.Tensor], torch.Tensor]]
    """Function: micro-batch with response tokens -> the loss, a scalar, of the divergences [r] at this rank's targets.

    Asked for where the head takes the rest of the loss too (`token_loss`).
    """


@dataclass(frozen=True)
class OutputOptions:
    """Statistics that the last stage computes for each response token, and how."""

    temperature: float = 1.0
    """Temperature by which logits are divided: statistics are those of softmax(logits / temperature)."""
    entropy: bool = True
    """Whether the entropy is computed; if not, None is returned in its place."""
    entropy_gradient: bool = False
    """Whether the entropy is differentiable; with a `token_loss` it always is."""
    head: HeadName = "recompute"
    """Output head that computes statistics when gradients are wanted; see `output_head`."""
    token_loss: Callable[[MicroBatch], TokenLoss] | None = None
    """Function for `head="fused_loss"`: micro-batch that holds response tokens -> the loss of some of these."""
    teacher: TeacherOutput | None = None
    """Teacher from whose distribution the divergence is computed too; None: there is no such statistic."""
    hidden: bool = False
    """Whether hidden states are wanted and nothing else, without gradient: those at this rank's targets."""


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics that leave the last pipeline stage, the same on all its tensor and context parallel ranks."""

    logprobs: torch.Tensor
    """Log-probs, [R] float32, with gradient when gradients are enabled, unless there is a `loss`."""
    entropies: torch.Tensor | None
    """Entropies, [R] float32, nats; None where they were not asked for."""
    loss: torch.Tensor | None = None
    """Loss of `head="fused_loss"`, a scalar; the log-probs and entropies then carry no gradient."""
    divergences: torch.Tensor | None = None
    """KL(policy || teacher) over the vocabulary, [R] float32, nats, with gradient; None without a teacher."""
    hidden: torch.Tensor | None = None
    """Hidden states [r, H] where only they were asked for; all else is then empty."""


class Output(NamedTuple):
    """Result of the model's last stage: the fields of `TokenStatistics`."""

    logprobs: torch.Tensor
    entropies: torch.Tensor | None
    loss: torch.Tensor | None
    divergences: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Device, as a tensor has one: megatron-core asks for it where a model has experts."""
        return self.logprobs.device
