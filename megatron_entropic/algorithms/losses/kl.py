"""Penalty towards a frozen reference, per token, for use in the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_entropic.algorithms.losses.policy_loss import MAX_LOG_RATIO


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Single-sample estimates of KL(pi || ref), with d = logp - logp_ref (J. Schulman, "Approximating KL divergence").

    As values all three estimate the same number on tokens sampled from pi: k1 and k3 without bias, k2 and k3 never
    negative. In a loss what counts is the gradient, and there they differ (arXiv 2510.01555):

        k1  value d                 gradient d * grad logp. Differentiating d itself gives grad logp, whose mean over pi
                                    is 0: no penalty at all, only noise. So the value is k1 and the gradient k2's.
        k2  value d^2 / 2           gradient d * grad logp: its mean over pi is the gradient of KL(pi || ref).
        k3  value exp(-d) - 1 + d   gradient (1 - exp(-d)) * grad logp, GRPO's: its mean over pi is the gradient of the
                                    OTHER direction, KL(ref || pi), equal to k2's to first order in d.

    "Mean over pi" is meant literally: on tokens of an older policy each is off by the missing ratio pi / pi_old.

    Args:
        logprobs: [T] current log-probabilities, with gradient.
        reference_logprobs: [T] of the reference, same temperature. Constants.
        estimator: "k1", "k2" or "k3".

    Returns:
        [T] in the dtype of `logprobs`. In k3, exp(-d) is bounded at exp(20).

    Raises:
        ValueError: the estimator is unknown or the shapes differ.
    """
    if logprobs.shape != reference_logprobs.shape:
        raise ValueError(f"log-probs {tuple(logprobs.shape)} but reference {tuple(reference_logprobs.shape)}")
    d = logprobs - reference_logprobs.detach()
    if estimator == "k1":
        k2 = 0.5 * d.square()
        return d.detach() + (k2 - k2.detach())
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.expm1((-d).clamp(max=MAX_LOG_RATIO)) + d
    raise ValueError(f"unknown KL estimator {estimator!r}: k1, k2 or k3")
