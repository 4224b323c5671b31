"""Correction for engines whose probabilities differ slightly from the policy's."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_entropic.algorithms.policy_loss import MAX_LOG_RATIO


def truncated_importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling (TIS) per token: w = min(pi_old / pi_rollout, cap), a constant.

    Source: F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025. Both
    log-probabilities must be of the same distribution up to numerics: same temperature, no top-p or top-k
    renormalisation on one side only.

    Args:
        old_logprobs: [T] log-probabilities that the policy's own score pass gives the sampled tokens.
        rollout_logprobs: [T] as the engine reported them.
        cap: upper bound of the weights, > 0.

    Returns:
        [T] in the dtype of `old_logprobs`, without gradient.

    Raises:
        ValueError: shapes differ or cap <= 0.
    """
    if old_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(f"policy log-probs {tuple(old_logprobs.shape)} but rollout's {tuple(rollout_logprobs.shape)}")
    if not cap > 0:
        raise ValueError(f"importance cap must be > 0, not {cap}")
    difference = (old_logprobs - rollout_logprobs).detach()
    return torch.exp(difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).clamp(max=cap)
