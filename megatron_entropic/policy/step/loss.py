"""The loss of one micro-batch, as its share of ONE loss over the whole optimizer step.

    L = sum_t w_t * l_t  +  sum_t alpha_t w'_t * a_t  +  beta * sum_t w_t * k_t  +  d * sum_t w_t * D_t
        -  c * sum_t w_t * H_t

    l   policy loss (algorithms/losses), times rollout-correction weights if configured; 0 where the controller drops
        the token (algorithms/entropy_control/steering)
    a   -|A| * ratio on tokens with pi > tau (EntroPIC), times the same correction weights iff l has them; alpha_t is
        the same for all tokens, or for those of a prompt (algorithms/entropy_control/steering)
    k   KL estimate towards the reference
    D   KL(policy || teacher) over the vocabulary, with gradient, where distillation is a term of the loss
    H   entropy, with gradient, for controllers that give it a coefficient c
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

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.algorithms import (
    PolicyLossTerms,
    Steering,
    entropic_term,
    high_prob_token_weights,
    kl_penalty,
    token_weights,
)
from megatron_entropic.algorithms.losses import LossInputs
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.policy.step.alphas import SOLVED_BINS, known_success, solved_bins, term_factors
from megatron_entropic.policy.step.loss_fields import LossSettings, TokenFields
from megatron_entropic.types import Sequence

SUMS = (
    "policy_loss",
    "entropic_loss",
    "kl_loss",
    "entropy_loss",
    "distillation_loss",
    "clipped",
    "ratio",
    "kept",
    "high_prob",
    "actuated",
    "nonzero_advantage",
    "tokens",
    "entropy",
    "divergence",
    "negative_weight",
    *(f"{name}_solved_{number}" for name in ("tokens", "actuated") for number in range(1, SOLVED_BINS + 1)),
)
"""Names of what `MicrobatchLoss.share` measures, in its vector's order; each adds up over micro-batches and ranks."""


def local_normalizers(fields: TokenFields, minibatch_sequences: int, data_parallel: int) -> Normalizers:
    """Counts of one micro-batch for `feedback: microbatch_local`, with the published code's weight of the share.

    Args:
        fields: the micro-batch, which has at least one sequence.
        minibatch_sequences: sequences of the optimizer step on this rank.
        data_parallel: number of ranks that hold different sequences.
    """
    sequences = fields.lengths.numel()
    scale = sequences / (minibatch_sequences * data_parallel)
    return Normalizers(tokens=fields.advantages.numel(), sequences=sequences, scale=scale)


def count_high_prob(logprobs: Tensor, tau: float) -> Tensor:
    """Number [] of tokens with pi > tau, by the same comparison as the loss, among those with log-probs [T]."""
    ones = torch.ones_like(logprobs)
    _, high_prob = entropic_term(logprobs, ones, ones, tau=tau, clip_low=0.5, clip_high=0.5)
    return high_prob.sum()


@dataclass(frozen=True)
class _Parts:
    """Summands of the loss over some tokens; scalars with gradient."""

    policy: Tensor
    entropic: Tensor
    kl: Tensor
    entropy: Tensor
    distillation: Tensor

    @property
    def total(self) -> Tensor:
        return self.policy + self.entropic + self.kl + self.entropy + self.distillation


@dataclass(frozen=True)
class _TokenTerms:
    """Terms of the loss of some tokens, each [T]."""

    policy: PolicyLossTerms
    adjustment: Tensor
    """EntroPIC's term a before alpha."""
    high_prob: Tensor
    kept: Tensor | None
    """Mask of the tokens whose policy loss counts; None: all."""


class MicrobatchLoss:
    """This micro-batch's share of the loss, of all its tokens at once or of some of them at a time.

    Args:
        fields: constants of the T response tokens.
        settings: settings of the loss.
        normalizers: global counts.
        steering: steering that the controller asks for; the default leaves the loss exactly the base loss.
    """

    def __init__(
        self, fields: TokenFields, settings: LossSettings, normalizers: Normalizers, steering: Steering
    ) -> None:
        self._fields = fields
        self._settings = settings
        self._normalizers = normalizers
        self._steering = steering
        self._weights = _weights(fields, settings, normalizers)

    def share(
        self, logprobs: Tensor, entropies: Tensor | None, divergences: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the share, and measure on the way.

        Args:
            logprobs: [T] float32 of the response tokens under the current weights, with gradient.
            entropies: [T] float32, or None when nobody reads them.
            divergences: [T] float32 from the teacher, with gradient; None without one.

        Returns:
            (loss scalar with gradient, [len(SUMS)] float64 measurements without gradient).
        """
        fields = self._fields
        terms = self._terms(logprobs, fields)
        parts = self._sum(logprobs, entropies, terms, fields, self._weights)
        if divergences is not None:
            parts = replace(parts, distillation=self.of_divergences(divergences, slice(None)))
        ones = torch.ones_like(logprobs)
        has_advantage = fields.advantages != 0
        per_token = (
            terms.policy.clipped,
            terms.policy.ratio,
            ones if terms.kept is None else terms.kept,
            terms.high_prob,
            terms.high_prob & has_advantage,
            has_advantage,
            ones,
            torch.zeros_like(logprobs) if entropies is None else entropies,
            torch.zeros_like(logprobs) if divergences is None else divergences,
        )
        sums = [parts.policy, parts.entropic, parts.kl, parts.entropy, parts.distillation]
        sums += [column.detach().double().sum() for column in (*per_token, self._against_advantage(terms))]
        by_success = [torch.zeros(SOLVED_BINS, dtype=torch.float64, device=logprobs.device)] * 2
        if fields.success is not None:
            marks = (ones.bool(), terms.high_prob & has_advantage)
            by_success = [solved_bins(fields.success, mark) for mark in marks]
        return parts.total, torch.cat([torch.stack([value.detach().double() for value in sums]), *by_success])

    def of_tokens(self, logprobs: Tensor, entropies: Tensor | None, tokens: slice | Tensor) -> Tensor:
        """Share of some tokens; these add up to `share`. It exists where `LossSettings.adds_up_over_tokens`.

        Args:
            logprobs: [c] float32 log-probs of these tokens.
            entropies: [c] float32 entropies or None.
            tokens: which of the T they are.
        """
        assert self._settings.adds_up_over_tokens
        fields = self._fields.select(tokens)
        return self._sum(logprobs, entropies, self._terms(logprobs, fields), fields, self._weights[tokens]).total

    def of_divergences(self, divergences: Tensor, tokens: slice | Tensor) -> Tensor:
        """Distillation's part of the share, of the divergences [c] of some tokens; it adds up over tokens."""
        return self._settings.divergence_coefficient * (self._weights[tokens] * divergences).sum()

    def _terms(self, logprobs: Tensor, fields: TokenFields) -> _TokenTerms:
        """Terms of some tokens; the correction weights go into both l and a, or into neither."""
        settings, algorithm = self._settings, self._settings.algorithm
        lengths = fields.lengths if settings.loss.whole_sequences else None
        steering, advantages = self._steering, fields.advantages
        if steering.logprob_scale:
            advantages = steering.rescaled(logprobs, advantages)
        if steering.clip_high is not None:
            algorithm = algorithm.model_copy(update={"clip_high": steering.clip_high})
        inputs = LossInputs(logprobs, fields.old_logprobs, advantages, fields.marks, lengths)
        policy = settings.loss.function(inputs, algorithm)
        if steering.focus is not None:
            policy = replace(policy, loss=policy.loss * steering.focus.at(known_success(fields.success), advantages))
        if fields.correction is not None:
            policy = replace(policy, loss=policy.loss * fields.correction)
        kept = None if self._steering.keeps_all else self._steering.kept(logprobs, fields.advantages)
        if kept is not None:
            policy = replace(policy, loss=policy.loss.masked_fill(~kept, 0.0))
        adjustment, high_prob = entropic_term(
            logprobs,
            policy.ratio,
            fields.advantages,
            tau=settings.tau if self._steering.tau is None else self._steering.tau,
            ratio_clip=settings.ratio_clip,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
            importance_weights=fields.correction,
        )
        return _TokenTerms(policy, adjustment, high_prob, kept)

    def _sum(
        self, logprobs: Tensor, entropies: Tensor | None, terms: _TokenTerms, fields: TokenFields, weights: Tensor
    ) -> _Parts:
        settings, steering = self._settings, self._steering
        policy = (weights * terms.policy.loss).sum()
        entropic, kl, bonus, distillation = (torch.zeros_like(policy) for _ in range(4))
        if steering.has_term:
            adjusted = self._term_weights(terms, fields, weights)
            if steering.prompt_alpha is None and settings.weight_limit is None:
                entropic = steering.alpha * (adjusted * terms.adjustment).sum()
            else:
                factors = term_factors(steering, fields.success, adjusted, weights, settings.weight_limit)
                entropic = (factors * terms.adjustment).sum()
        if fields.reference_logprobs is not None:
            penalty = kl_penalty(logprobs, fields.reference_logprobs, settings.algorithm.kl.estimator)
            kl = settings.algorithm.kl.coefficient * (weights * penalty).sum()
        if steering.entropy_coefficient:
            assert entropies is not None
            if steering.bonus_threshold is not None:
                weights = weights * steering.bonus_factors(known_success(fields.success))
            bonus = -steering.entropy_coefficient * (weights * entropies).sum()
        return _Parts(policy, entropic, kl, bonus, distillation)

    def _term_weights(self, terms: _TokenTerms, fields: TokenFields, weights: Tensor) -> Tensor:
        if self._settings.high_prob_denominator:
            return _high_prob_weights(terms.high_prob, fields, self._settings, self._normalizers)
        return weights

    def _against_advantage(self, terms: _TokenTerms) -> Tensor:
        """Marks [T] of tokens that loss and term together push against their advantage: 1 +- alpha w' / w < 0."""
        if not self._steering.has_term:
            return torch.zeros_like(terms.high_prob)
        fields, weights = self._fields, self._weights
        adjusted = self._term_weights(terms, fields, weights)
        factors = term_factors(self._steering, fields.success, adjusted, weights, self._settings.weight_limit)
        return terms.high_prob & (weights + fields.advantages.sign() * factors < 0)


def _weights(fields: TokenFields, settings: LossSettings, normalizers: Normalizers) -> Tensor:
    weights = token_weights(
        settings.algorithm.aggregation,
        fields.lengths,
        global_tokens=normalizers.tokens,
        global_sequences=normalizers.sequences,
        max_response_tokens=settings.max_response_tokens,
        tokens=fields.advantages.numel(),
    )
    return weights if normalizers.scale == 1.0 else weights * normalizers.scale


def _high_prob_weights(
    high_prob: Tensor, fields: TokenFields, settings: LossSettings, normalizers: Normalizers
) -> Tensor:
    adjusted = high_prob_token_weights(
        settings.algorithm.aggregation,
        high_prob,
        fields.lengths,
        # The count was taken in another forward pass: a token on the threshold may have crossed it by rounding.
        global_high_prob_tokens=high_prob.sum().double().clamp(min=normalizers.high_prob_tokens),
        global_sequences=normalizers.sequences,
        max_response_tokens=settings.max_response_tokens,
    )
    return adjusted if normalizers.scale == 1.0 else adjusted * normalizers.scale


# Counts over a whole optimizer step, summed over replicas: what loss weights divide by.


@dataclass(frozen=True)
class Normalizers:
    """Counts over the whole optimizer step: all micro-batches, all replicas."""

    tokens: float
    """Number of response tokens."""
    sequences: float
    high_prob_tokens: float = 0.0
    """Number of response tokens with pi > tau under the weights before this step, for `denominator: high_prob_tokens`.

    A micro-batch that holds more of them than this uses its own count.
    """
    scale: float = 1.0
    """Factor of a micro-batch's whole share of the loss: 1, except in `feedback: microbatch_local`."""


def global_counts(
    sequences: list[Sequence], parallel: ParallelState, device: torch.device, high_prob_tokens: float = 0.0
) -> Normalizers:
    """Sum the counts of all replicas; known on every rank, since all ranks of a replica hold its sequences.

    Args:
        sequences: sequences of this replica.
        parallel: this rank's place.
        device: device of the policy.
        high_prob_tokens: count of this replica.
    """
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    # Context-parallel ranks hold the same sequences: one of them counts.
    if parallel.context_rank == 0:
        tokens = sum(sequence.response_length for sequence in sequences)
        counts += torch.tensor([tokens, len(sequences), high_prob_tokens], dtype=torch.float64, device=device)
    dist.all_reduce(counts, group=parallel.data_context_group)
    return Normalizers(*counts.tolist())
