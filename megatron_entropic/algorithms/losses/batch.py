"""Losses that look at all tokens of the optimizer step before it begins, and treat each according to its rank.

A plan marks tokens from statistics under the weights before the step, reduced over all replicas; the published codes
do the same within each micro-batch, so there the choice depends on packing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_entropic.algorithms.losses.interface import Across, BatchTokens, LossInputs
from megatron_entropic.algorithms.losses.policy_loss import PolicyLossTerms
from megatron_entropic.algorithms.losses.token import clipped

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import AlgorithmConfig


def covariances(tokens: BatchTokens, across: Across) -> tuple[Tensor, int]:
    """Products (A - mean A) (log pi - mean log pi) of tokens, [N] float64, and the number of all replicas' tokens."""
    advantages, logprobs = tokens.advantages.double(), tokens.logprobs.double()
    sums = torch.stack([advantages.sum(), logprobs.sum(), advantages.new_tensor(float(advantages.numel()))])
    total_advantage, total_logprob, count = across.sum(sums).tolist()
    covariance = (advantages - total_advantage / count) * (logprobs - total_logprob / count)
    return covariance, int(count)


def _marked(scores: Tensor, fraction: float, count: int, across: Across) -> Tensor:
    """Marks [N] float32: 1 where a score is among the largest `fraction` of all `count` tokens and not -inf."""
    chosen = across.largest(scores, max(1, int(fraction * count)))
    threshold = float(chosen[-1]) if chosen.numel() else float("inf")
    return ((scores >= threshold) & (scores > -torch.inf)).float()


def clip_cov_plan(tokens: BatchTokens, across: Across, algorithm: AlgorithmConfig) -> Tensor:
    """Mark a random share of the tokens whose covariance lies between the bounds."""
    options = algorithm.loss_options
    covariance, count = covariances(tokens, across)
    eligible = (covariance > options.clip_cov_low) & (covariance < options.clip_cov_high)
    keys = tokens.keys.masked_fill(~eligible, -torch.inf)
    return _marked(keys, options.covariance_fraction, count, across)


def clip_cov(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLossTerms:
    """Clip-Cov: the clipped loss without the marked tokens (arXiv 2505.22617, section 4.2).

    High covariance of log-probability and advantage is what lowers entropy; a share of those tokens is detached.
    """
    assert inputs.marks is not None
    terms = clipped(inputs, algorithm)
    dropped = inputs.marks > 0
    return PolicyLossTerms(terms.loss.masked_fill(dropped, 0.0), terms.ratio, terms.clipped | dropped)


def kl_cov_plan(tokens: BatchTokens, across: Across, algorithm: AlgorithmConfig) -> Tensor:
    """Mark the share of tokens with the largest covariance, if positive: without advantages all are tied at 0."""
    covariance, count = covariances(tokens, across)
    return _marked(
        covariance.masked_fill(covariance <= 0, -torch.inf), algorithm.loss_options.covariance_fraction, count, across
    )


def kl_cov(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLossTerms:
    """KL-Cov: l = -r A, on marked tokens + beta |log pi - log pi_old| (arXiv 2505.22617, section 4.2; verl).

    As published it is not clipped, and the penalty has no gradient while pi = pi_old.
    """
    assert inputs.marks is not None
    ratio = inputs.ratio
    penalty = inputs.marks * (inputs.logprobs - inputs.old_logprobs).abs()
    return PolicyLossTerms(
        loss=-ratio * inputs.advantages + algorithm.loss_options.kl_cov_coefficient * penalty,
        ratio=ratio,
        clipped=inputs.marks > 0,
    )


def steer_plan(tokens: BatchTokens, across: Across, algorithm: AlgorithmConfig) -> Tensor:
    """Weights from the estimated change of entropy, omega = |A / pi_old * pi (1 - pi) (log pi + H)|:

    w = w_max - (w_max - w_min) (omega - min) / (max - min), min and max over the whole optimizer step.
    """
    options = algorithm.loss_options
    probability = tokens.logprobs.double().exp().clamp(1e-8, 1.0 - 1e-8)
    change = probability * (1.0 - probability) * (probability.log() + tokens.entropies.double())
    omega = (tokens.advantages.double() / tokens.old_logprobs.double().exp().clamp(1e-8, 1.0) * change).abs()
    most, least = float(across.largest(omega, 1)[0]), -float(across.largest(-omega, 1)[0])
    if most == least:
        return torch.full_like(tokens.logprobs, 0.5 * (options.steer_weight_min + options.steer_weight_max))
    slope = (options.steer_weight_max - options.steer_weight_min) / (most - least)
    return (options.steer_weight_max - slope * (omega - least)).float()


def steer(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLossTerms:
    """STEER: the clipped loss times a weight that falls with the token's effect on entropy.

    Source: arXiv 2510.10150, zz-haooo/STEER.
    """
    assert inputs.marks is not None
    terms = clipped(inputs, algorithm)
    return PolicyLossTerms(terms.loss * inputs.marks, terms.ratio, terms.clipped)
