"""What the model's last stage is asked for, and what it returns. Apart from the head, which imports megatron-core."""

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
    """What the last stage computes for each response token."""

    temperature: float = 1.0
    """Divides the logits: statistics are those of softmax(logits / temperature)."""
    entropy: bool = True
    """False computes no entropy and returns None in its place."""
    entropy_gradient: bool = False
    """Whether the entropy is differentiable; with a `token_loss` it always is."""
    head: HeadName = "recompute"
    """How hidden states become statistics when gradients are wanted; see `output_head`."""
    token_loss: Callable[[MicroBatch], TokenLoss] | None = None
    """For `head="fused_loss"`: the loss of some response tokens of a micro-batch that holds any."""


@dataclass(frozen=True)
class TokenStatistics:
    """What leaves the last pipeline stage, the same on all its tensor and context parallel ranks."""

    logprobs: torch.Tensor
    """[R] float32, with gradient when gradients are enabled, unless there is a `loss`."""
    entropies: torch.Tensor | None
    """[R] float32, nats."""
    loss: torch.Tensor | None = None
    """Scalar whose gradient has been taken already, with `head="fused_loss"`; the others then carry none."""


class Output(NamedTuple):
    """What the model's last stage returns: the fields of `TokenStatistics`."""

    logprobs: torch.Tensor
    entropies: torch.Tensor | None
    loss: torch.Tensor | None

    @property
    def device(self) -> torch.device:
        """As of a tensor: megatron-core asks for it where a model has experts."""
        return self.logprobs.device
