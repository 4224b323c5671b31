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


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics that leave the last pipeline stage, the same on all its tensor and context parallel ranks."""

    logprobs: torch.Tensor
    """Log-probs, [R] float32, with gradient when gradients are enabled, unless there is a `loss`."""
    entropies: torch.Tensor | None
    """Entropies, [R] float32, nats; None where they were not asked for."""
    loss: torch.Tensor | None = None
    """Loss whose gradient has been taken already, a scalar, with `head="fused_loss"`; the others then carry none."""


class Output(NamedTuple):
    """Result of the model's last stage: the fields of `TokenStatistics`."""

    logprobs: torch.Tensor
    entropies: torch.Tensor | None
    loss: torch.Tensor | None

    @property
    def device(self) -> torch.device:
        """Device, as a tensor has one: megatron-core asks for it where a model has experts."""
        return self.logprobs.device
