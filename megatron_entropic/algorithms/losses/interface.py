"""What a policy loss gets and gives. T is the number of response tokens at hand, sequence after sequence.

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
    """[T] under the current weights; carries the gradient."""
    old_logprobs: Tensor
    """[T] under the weights that scored the rollout. Constants, like all that follow."""
    advantages: Tensor
    """[T]."""
    marks: Tensor | None = None
    """[T] float32 from the loss's own plan; None for a loss without one."""
    lengths: Tensor | None = None
    """[n] int64 tokens of each sequence; only for losses of whole sequences, whose T are n whole sequences."""

    @property
    def ratio(self) -> Tensor:
        """[T] pi / pi_old = exp(clamp(logp - logp_old, -20, 20)), with gradient."""
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
    """[N] under the weights before the step."""
    entropies: Tensor
    """[N] nats."""
    old_logprobs: Tensor
    """[N]."""
    advantages: Tensor
    """[N]."""
    keys: Tensor
    """[N] float64 in [0, 1): a random number for each token that depends on its sequence, position and the number of
    the optimizer step only, so that draws do not depend on the layout."""


LossFunction = Callable[[LossInputs, "AlgorithmConfig"], PolicyLossTerms]
PlanFunction = Callable[[BatchTokens, Across, "AlgorithmConfig"], Tensor]
"""[N] float32 marks, which the loss function finds in `LossInputs.marks`."""


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A policy loss and what it needs."""

    function: LossFunction
    plan: PlanFunction | None = None
    """For losses that compare tokens of the whole optimizer step: called once before it, after a forward pass."""
    whole_sequences: bool = False
    """Whether a token's loss depends on the other tokens of its sequence."""
