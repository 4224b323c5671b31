"""Per-token policy losses: the clipped surrogate and the EntroPIC term. T is the number of selected response tokens.

Nothing is averaged here: a loss is the sum of these values times the weights of `aggregation`.

    L = sum_t w_t * l_t  +  alpha * sum_t w'_t * a_t        l from policy_loss, a from entropic_term
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Limit of |log-probability difference| before exp: a stale token gives a large finite ratio, never inf."""


@dataclass(slots=True)
class PolicyLossTerms:
    """Result of a policy loss, each part [T]."""

    loss: Tensor
    """Loss of each token, not aggregated; carries the gradient."""
    ratio: Tensor
    """Ratio pi / pi_old before any clipping; carries the gradient."""
    clipped: Tensor
    """Whether the loss treats a token otherwise than plain policy gradient, bool.

    For `policy_loss`: clip or dual clip holds the token's ratio and its loss has no gradient.
    """


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    importance_weights: Tensor | None = None,
) -> PolicyLossTerms:
    """PPO's clipped surrogate with separate bounds (clip-higher, DAPO) and dual clip.

        r = exp(clamp(logp - logp_old, -20, 20))
        l = -w * A * clamp(r, lower, upper)     A > 0: r <= 1 + clip_high;  A < 0: 1 - clip_low <= r <= dual_clip

    This one-sided clamp is max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)), and for A < 0 its minimum with
    -A * dual_clip, written so that the gradient is unambiguous: that of -w A r inside the bounds (ends included), 0
    outside. Sources: PPO arXiv 1707.06347 eq. 7, dual clip arXiv 1912.09729 eq. 5, clip-higher arXiv 2503.14476 eq. 10.

    Args:
        logprobs: [T] log-probabilities under the current weights, with gradient.
        old_logprobs: [T] under the weights that scored the rollout, same temperature. Constants.
        advantages: [T]. Constants.
        clip_low, clip_high: widths of the clip range below and above 1.
        dual_clip: bound c > 1 of the ratio for A < 0; None switches it off.
        importance_weights: [T] rollout-correction weights w, constants; None is 1.

    Returns:
        `PolicyLossTerms`, dtype of `logprobs`.

    Raises:
        ValueError: shapes differ, or dual_clip <= 1.
    """
    _check_shapes(logprobs, old_logprobs, advantages, importance_weights)
    ratio = torch.exp((logprobs - old_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    lower, upper = clip_bounds(advantages, clip_low, clip_high, dual_clip)
    loss = -advantages.detach() * ratio.clamp(lower, upper)
    if importance_weights is not None:
        loss = loss * importance_weights.detach()
    held = ratio.detach()
    return PolicyLossTerms(loss=loss, ratio=ratio, clipped=(held < lower) | (held > upper))


def entropic_term(
    logprobs: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    *,
    tau: float,
    ratio_clip: str = "none",
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    importance_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """EntroPIC's adjustment before alpha: a_t = -w * |A_t| * r_t on tokens with pi(token) > tau, else 0.

    Added to the clipped loss with factor alpha it weights high-probability tokens by 1 + alpha where A > 0 and by
    1 - alpha where A < 0 (arXiv 2511.15248). The selection looks at the current policy and is strict: pi == tau is out.

    `ratio_clip` says which r_t is used:
        "none": the raw ratio, as in the published code. A token that the PPO clip holds still gets this gradient.
        "ppo": the ratio clamped with exactly the bounds of `policy_loss` for this token's advantage. Where that clip is
            active the term is a constant and has no gradient; for any ratio, main loss and term together are the main
            loss times 1 + alpha * sign(A).

    Args:
        logprobs: [T] log-probabilities under the current weights at the rollout temperature. Only the selection reads
            them, so no gradient flows through it.
        ratio: [T] `PolicyLossTerms.ratio`; the gradient flows through it.
        advantages: [T]. Constants.
        tau: probability threshold in [0, 1).
        ratio_clip: "none" or "ppo".
        clip_low, clip_high, dual_clip: the main loss's, read by "ppo" only.
        importance_weights: [T], given iff the main loss got them; constants.

    Returns:
        (a [T], high_prob [T] bool), a in the dtype of `ratio`.

    Raises:
        ValueError: shapes differ, tau is out of range, ratio_clip is unknown, or dual_clip <= 1.
    """
    _check_shapes(logprobs, ratio, advantages, importance_weights)
    if not 0 <= tau < 1:
        raise ValueError(f"tau must be a probability in [0, 1), not {tau}")
    if ratio_clip not in ("none", "ppo"):
        raise ValueError(f"ratio_clip must be 'none' or 'ppo', not {ratio_clip!r}")
    high_prob = logprobs.detach() > (math.log(tau) if tau > 0 else -math.inf)
    if ratio_clip == "ppo":
        ratio = ratio.clamp(*clip_bounds(advantages, clip_low, clip_high, dual_clip))
    term = -advantages.detach().abs() * ratio
    if importance_weights is not None:
        term = term * importance_weights.detach()
    return term.masked_fill(~high_prob, 0.0), high_prob


def clip_bounds(
    advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Bounds [T] between which a token's ratio moves its loss; infinite where nothing clips (A = 0 included)."""
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None, not {dual_clip}")
    positive, negative = advantages > 0, advantages < 0
    lower = torch.full_like(advantages, -math.inf).masked_fill(negative, 1.0 - clip_low)
    upper = torch.full_like(advantages, math.inf).masked_fill(positive, 1.0 + clip_high)
    if dual_clip is not None:
        upper = upper.masked_fill(negative, dual_clip)
    return lower, upper


def _check_shapes(first: Tensor, *others: Tensor | None) -> None:
    """Refuse per-token inputs that are not all [T]: a silent broadcast would train on the wrong tokens."""
    shapes = [tuple(t.shape) for t in (first, *others) if t is not None]
    if first.dim() != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"per-token inputs must all be [T], got shapes {shapes}")


# Penalty towards a frozen reference, per token, for use in the loss.


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
