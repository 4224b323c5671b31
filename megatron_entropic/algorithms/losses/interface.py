"""Inputs and result of a policy loss. T is the number of response tokens at hand, sequence after sequence.

A loss is per token and not aggregated: weights, rollout correction, EntroPIC's term and KL penalty come from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_entropic.algorithms.losses.policy_loss import MAX_LOG_RATIO, PolicyLossTerms

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import AlgorithmConfig


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Per-token inputs of a policy loss."""

    logprobs: Tensor
    """Log-probs under the current weights, [T]; carries the gradient."""
    old_logprobs: Tensor
    """Log-probs under the weights that scored the rollout, [T]. Constants, like all that follow."""
    advantages: Tensor
    """Advantages, [T]."""
    marks: Tensor | None = None
    """Marks from the loss's own plan, [T] float32; None for a loss without one."""
    lengths: Tensor | None = None
    """Tokens of each sequence, [n] int64; only for losses of whole sequences, whose T are n whole sequences."""

    @property
    def ratio(self) -> Tensor:
        """Ratios pi / pi_old = exp(clamp(logp - logp_old, -20, 20)), [T], with gradient."""
        return torch.exp((self.logprobs - self.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


class Across(Protocol):
    """Reductions over all replicas of an optimizer step, for plans."""

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sums of [k] float64 over replicas."""

    def largest(self, values: Tensor, count: int) -> Tensor:
        """The `count` largest of all replicas' values [N], falling; fewer if there are fewer."""


@dataclass(frozen=True, slots=True)
class BatchTokens:
    """All N response tokens of a replica's part of an optimizer step, before it begins; constants."""

    logprobs: Tensor
    """Log-probs under the weights before the step, [N]."""
    entropies: Tensor
    """Entropies, [N], nats."""
    old_logprobs: Tensor
    """Log-probs under the weights that scored the rollout, [N]."""
    advantages: Tensor
    """Advantages, [N]."""
    keys: Tensor
    """Random number of each token, [N] float64 in [0, 1).

    It depends on the token's sequence, position and the number of the optimizer step only, so that draws do not depend
    on the layout.
    """


LossFunction = Callable[[LossInputs, "AlgorithmConfig"], PolicyLossTerms]
PlanFunction = Callable[[BatchTokens, Across, "AlgorithmConfig"], Tensor]
"""Function that returns marks, [N] float32, which the loss function finds in `LossInputs.marks`."""


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A policy loss as a function, with what it needs besides."""

    function: LossFunction
    plan: PlanFunction | None = None
    """Plan of a loss that compares tokens of the whole optimizer step: called once before it, after a forward pass."""
    whole_sequences: bool = False
    """Whether a token's loss depends on the other tokens of its sequence."""
