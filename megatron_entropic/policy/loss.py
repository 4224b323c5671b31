"""The loss of one micro-batch, as its share of ONE loss over the whole optimizer step.

    L = sum_t w_t * l_t  +  alpha * sum_t w'_t * a_t  +  beta * sum_t w_t * k_t

    l   clipped surrogate (algorithms/policy_loss), times rollout-correction weights if configured
    a   -|A| * ratio on tokens with pi > tau (EntroPIC), times the same correction weights iff l has them (S4)
    k   KL estimate towards the reference
    w   from GLOBAL counts (algorithms/aggregation); w' = w, or over high-probability tokens only
    t   runs over all response tokens of all micro-batches of all data-parallel ranks

A micro-batch contributes the terms of its own tokens, so the shares of all micro-batches and ranks SUM to L and the
summed gradient is that of L. Nothing else may scale it: `optimizer.wrap_data_parallel` makes megatron-core sum, where
by default it divides by the number of micro-batches and averages over data-parallel ranks.

`feedback: microbatch_local` reproduces the published code instead: counts are those of the micro-batch, alpha is the
micro-batch's own, and the share is weighted by its fraction of the rank's sequences and divided by the number of ranks:

    L = 1/R sum_ranks sum_mb (S_mb / S_rank) * (L_clip(mb) + alpha_mb * masked mean of a over mb)
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_entropic.algorithms import (
    PolicyLossTerms,
    entropic_term,
    high_prob_token_weights,
    kl_penalty,
    policy_loss,
    token_weights,
    truncated_importance_weights,
)
from megatron_entropic.config import Aggregation, Config
from megatron_entropic.policy.normalizers import Normalizers
from megatron_entropic.types import Sequence

SUMS = (
    "policy_loss",
    "entropic_loss",
    "kl_loss",
    "clipped",
    "ratio",
    "high_prob",
    "nonzero_advantage",
    "tokens",
    "entropy",
)
"""What `MicrobatchLoss.share` measures, in the order of its vector; each adds up over micro-batches and ranks."""


@dataclass(frozen=True)
class LossSettings:
    """The knobs of the loss, from several sections of the configuration."""

    aggregation: Aggregation
    max_response_tokens: int
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coefficient: float
    kl_estimator: str
    importance_cap: float | None
    """None: no rollout correction."""
    tau: float
    ratio_clip: str
    high_prob_denominator: bool

    @property
    def adds_up_over_tokens(self) -> bool:
        """Whether each token's loss depends on nothing but the token and what is known before the forward pass.

        The high-probability denominator of a sequence depends on the log-probabilities of all its tokens.
        """
        return not self.high_prob_denominator

    @classmethod
    def from_config(cls, config: Config) -> LossSettings:
        """Collect them."""
        algorithm, control = config.algorithm, config.entropy_control
        corrected = config.rollout.importance_correction == "tis"
        return cls(
            aggregation=algorithm.aggregation,
            max_response_tokens=config.rollout.max_response_tokens,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
            kl_coefficient=algorithm.kl.coefficient,
            kl_estimator=algorithm.kl.estimator,
            importance_cap=config.rollout.importance_cap if corrected else None,
            tau=control.tau,
            ratio_clip=control.ratio_clip,
            high_prob_denominator=control.enabled and control.denominator == "high_prob_tokens",
        )


@dataclass(frozen=True)
class TokenFields:
    """Constants of a micro-batch's response tokens, sequence after sequence; T = sum of `lengths`."""

    lengths: Tensor
    """[n] int64 response tokens of each sequence."""
    old_logprobs: Tensor
    """[T] float32."""
    advantages: Tensor
    """[T] float32."""
    rollout_logprobs: Tensor | None
    """[T] float32; None without rollout correction."""
    reference_logprobs: Tensor | None
    """[T] float32; None without KL penalty."""

    def select(self, tokens: slice) -> TokenFields:
        """The constants of some of the tokens; `lengths` remain those of the whole micro-batch."""
        return replace(
            self,
            old_logprobs=self.old_logprobs[tokens],
            advantages=self.advantages[tokens],
            rollout_logprobs=None if self.rollout_logprobs is None else self.rollout_logprobs[tokens],
            reference_logprobs=None if self.reference_logprobs is None else self.reference_logprobs[tokens],
        )


def token_fields(sequences: Seq[Sequence], settings: LossSettings, device: torch.device) -> TokenFields:
    """Concatenate what the loss reads from the sequences of one micro-batch.

    Raises:
        ValueError: a sequence lacks a field that the configured loss needs, or a field is not [R].
    """
    fields = {
        "old_logprobs": True,
        "advantages": True,
        "rollout_logprobs": settings.importance_cap is not None,
        "reference_logprobs": settings.kl_coefficient > 0,
    }
    columns = {name: _column(sequences, name, device) if needed else None for name, needed in fields.items()}
    old_logprobs, advantages = columns["old_logprobs"], columns["advantages"]
    assert old_logprobs is not None
    assert advantages is not None
    return TokenFields(
        lengths=torch.tensor([sequence.response_length for sequence in sequences], dtype=torch.int64, device=device),
        old_logprobs=old_logprobs,
        advantages=advantages,
        rollout_logprobs=columns["rollout_logprobs"],
        reference_logprobs=columns["reference_logprobs"],
    )


def _column(sequences: Seq[Sequence], name: str, device: torch.device) -> Tensor:
    parts = []
    for index, sequence in enumerate(sequences):
        part = getattr(sequence, name)
        if part is None or part.shape != (sequence.response_length,):
            found = "nothing" if part is None else f"shape {tuple(part.shape)}"
            raise ValueError(f"sequence {index}: {name} needs [{sequence.response_length}], got {found}")
        parts.append(part.to(dtype=torch.float32))
    return torch.cat(parts).to(device)


def local_normalizers(fields: TokenFields, minibatch_sequences: int, data_parallel: int) -> Normalizers:
    """Counts of one micro-batch for `feedback: microbatch_local`, with the published code's weight of the share.

    Args:
        fields: the micro-batch, which has at least one sequence.
        minibatch_sequences: sequences of the optimizer step on this rank.
        data_parallel: number of ranks that hold different sequences.
    """
    sequences = fields.lengths.numel()
    scale = sequences / (minibatch_sequences * data_parallel)
    return Normalizers(tokens=float(fields.lengths.sum()), sequences=sequences, scale=scale)


def count_high_prob(logprobs: Tensor, settings: LossSettings) -> float:
    """Number of tokens with pi > tau, by the same comparison as the loss. logprobs [T]."""
    ones = torch.ones_like(logprobs)
    _, high_prob = entropic_term(logprobs, ones, ones, tau=settings.tau, clip_low=0.5, clip_high=0.5)
    return float(high_prob.sum())


class MicrobatchLoss:
    """This micro-batch's share of the loss, of all its tokens at once or of some of them at a time.

    Args:
        fields: constants of the T response tokens.
        settings: knobs.
        normalizers: global counts.
        alpha: coefficient of the EntroPIC term; None or 0 leaves the loss exactly the base loss.
    """

    def __init__(
        self, fields: TokenFields, settings: LossSettings, normalizers: Normalizers, alpha: float | None
    ) -> None:
        self._fields = fields
        self._settings = settings
        self._normalizers = normalizers
        self._alpha = alpha
        self._weights = _weights(fields, settings, normalizers)

    def share(self, logprobs: Tensor, entropies: Tensor | None) -> tuple[Tensor, Tensor]:
        """The share, and what is measured on the way.

        Args:
            logprobs: [T] float32 of the response tokens under the current weights, with gradient.
            entropies: [T] float32, or None when nobody reads them.

        Returns:
            (loss scalar with gradient, [len(SUMS)] float64 measurements without gradient).
        """
        fields = self._fields
        terms, adjustment, high_prob = _token_terms(logprobs, fields, self._settings)
        parts = self._sum(logprobs, terms, adjustment, high_prob, fields, self._weights)
        entropy = torch.zeros_like(logprobs) if entropies is None else entropies
        per_token = (terms.clipped, terms.ratio, high_prob, fields.advantages != 0, torch.ones_like(logprobs), entropy)
        sums = [*parts, *(column.detach().double().sum() for column in per_token)]
        return _total(parts), torch.stack([value.detach().double() for value in sums])

    def of_tokens(self, logprobs: Tensor, tokens: slice) -> Tensor:
        """The share of some tokens; these add up to `share`. It exists where `LossSettings.adds_up_over_tokens`.

        Args:
            logprobs: [c] float32 of these tokens.
            tokens: which of the T they are.
        """
        assert self._settings.adds_up_over_tokens
        fields = self._fields.select(tokens)
        terms, adjustment, high_prob = _token_terms(logprobs, fields, self._settings)
        return _total(self._sum(logprobs, terms, adjustment, high_prob, fields, self._weights[tokens]))

    def _sum(
        self,
        logprobs: Tensor,
        terms: PolicyLossTerms,
        adjustment: Tensor,
        high_prob: Tensor,
        fields: TokenFields,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(policy, EntroPIC, KL) parts of the loss over the tokens given."""
        settings = self._settings
        policy = (weights * terms.loss).sum()
        entropic, kl = torch.zeros_like(policy), torch.zeros_like(policy)
        if self._alpha:
            adjusted = weights
            if settings.high_prob_denominator:
                adjusted = _high_prob_weights(high_prob, fields, settings, self._normalizers)
            entropic = self._alpha * (adjusted * adjustment).sum()
        if fields.reference_logprobs is not None:
            penalty = kl_penalty(logprobs, fields.reference_logprobs, settings.kl_estimator)
            kl = settings.kl_coefficient * (weights * penalty).sum()
        return policy, entropic, kl


def _total(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    policy, entropic, kl = parts
    return policy + entropic + kl


def _token_terms(
    logprobs: Tensor, fields: TokenFields, settings: LossSettings
) -> tuple[PolicyLossTerms, Tensor, Tensor]:
    """(l with its ratio, a [T], pi > tau [T]); the correction weights go into both l and a, or into neither (S4)."""
    correction = None
    if fields.rollout_logprobs is not None and settings.importance_cap is not None:
        correction = truncated_importance_weights(fields.old_logprobs, fields.rollout_logprobs, settings.importance_cap)
    terms = policy_loss(
        logprobs,
        fields.old_logprobs,
        fields.advantages,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        importance_weights=correction,
    )
    adjustment, high_prob = entropic_term(
        logprobs,
        terms.ratio,
        fields.advantages,
        tau=settings.tau,
        ratio_clip=settings.ratio_clip,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        importance_weights=correction,
    )
    return terms, adjustment, high_prob


def _weights(fields: TokenFields, settings: LossSettings, normalizers: Normalizers) -> Tensor:
    weights = token_weights(
        settings.aggregation,
        fields.lengths,
        global_tokens=normalizers.tokens,
        global_sequences=normalizers.sequences,
        max_response_tokens=settings.max_response_tokens,
    )
    return weights if normalizers.scale == 1.0 else weights * normalizers.scale


def _high_prob_weights(
    high_prob: Tensor, fields: TokenFields, settings: LossSettings, normalizers: Normalizers
) -> Tensor:
    adjusted = high_prob_token_weights(
        settings.aggregation,
        high_prob,
        fields.lengths,
        # The count was taken in another forward pass: a token on the threshold may have crossed it by rounding.
        global_high_prob_tokens=max(normalizers.high_prob_tokens, float(high_prob.sum())),
        global_sequences=normalizers.sequences,
        max_response_tokens=settings.max_response_tokens,
    )
    return adjusted if normalizers.scale == 1.0 else adjusted * normalizers.scale
