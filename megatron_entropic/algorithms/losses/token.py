"""Losses in which each token stands for itself, and GSPO, in which each sequence does.

r = pi / pi_old of a token, A its advantage, sg() a constant; at r = 1 all have the gradient of plain policy gradient,
-A grad log pi.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_entropic.algorithms.aggregation import sequence_of_tokens
from megatron_entropic.algorithms.losses.interface import LossInputs
from megatron_entropic.algorithms.losses.policy_loss import MAX_LOG_RATIO, PolicyLossTerms, clip_bounds, policy_loss

if TYPE_CHECKING:
    from megatron_entropic.config.algorithm import AlgorithmConfig


def clipped(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLossTerms:
    """PPO's clipped surrogate with clip-higher and dual clip; `policy_loss` has formula and sources."""
    return policy_loss(
        inputs.logprobs,
        inputs.old_logprobs,
        inputs.advantages,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
    )


def reinforce(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLossTerms:
    """REINFORCE: l = -A log pi, without a ratio (Williams 1992).

    With `advantage: rloo` this is REINFORCE with leave-one-out (arXiv 2402.14740); with `nsr` or `w_reinforce` that of
    arXiv 2506.01347. Off-policy it is biased: nothing corrects for the distance from the policy that sampled.
    """
    return PolicyLossTerms(
        loss=-inputs.advantages * inputs.logprobs,
        ratio=inputs.ratio,
        clipped=torch.zeros_like(inputs.advantages, dtype=torch.bool),
    )


def cispo(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLossTerms:
    """CISPO: l = -sg(clamp(r, 1 - clip_low, 1 + clip_high)) A log pi (MiniMax-M1, arXiv 2506.13585, eq. 4).

    The weight is clipped, not the gradient: every token keeps one. `clipped` tells where the weight is at a bound.
    """
    ratio = inputs.ratio
    weight = ratio.detach().clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
    return PolicyLossTerms(
        loss=-weight * inputs.advantages * inputs.logprobs, ratio=ratio, clipped=weight != ratio.detach()
    )


def ce_gppo(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLossTerms:
    """CE-GPPO: clipped tokens keep a bounded gradient (arXiv 2509.20712, as in Kwai-Klear/CE-GPPO).

    A < 0, r < 1 - clip_low:    l = -beta_low  (1 - clip_low)  r / sg(r) A
    A > 0, r > 1 + clip_high:   l = -beta_high (1 + clip_high) r / sg(r) A
    A < 0, r > dual_clip:       l = -dual_clip A, without gradient
    else                        l = -r A
    """
    ratio, advantages, options = inputs.ratio, inputs.advantages, algorithm.loss_options
    held = ratio.detach()
    low = (advantages < 0) & (held < 1.0 - algorithm.clip_low)
    high = (advantages > 0) & (held > 1.0 + algorithm.clip_high)
    factor = torch.ones_like(held)
    factor = torch.where(low, options.ce_gppo_beta_low * (1.0 - algorithm.clip_low) / held, factor)
    factor = torch.where(high, options.ce_gppo_beta_high * (1.0 + algorithm.clip_high) / held, factor)
    loss = -factor * ratio * advantages
    if algorithm.dual_clip is not None:
        far = (advantages < 0) & (held > algorithm.dual_clip)
        loss = torch.where(far, -algorithm.dual_clip * advantages, loss)
    return PolicyLossTerms(loss=loss, ratio=ratio, clipped=low | high)


def gspo(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLossTerms:
    """GSPO in its token form: the ratio is the geometric mean over the sequence (arXiv 2507.18071, eq. 7 and 14).

        s   = exp(mean over the sequence of log pi - log pi_old)
        s_t = sg(s) pi / sg(pi)                                  the same value, with the gradient of its own token
        l   = max(-s_t A, -clamp(s_t, 1 - clip_low, 1 + clip_high) A)

    The paper takes seq-mean-token-mean, and bounds of a few 1e-4: the ratio of a long sequence hardly leaves 1.
    """
    assert inputs.lengths is not None
    lengths = inputs.lengths.to(inputs.logprobs.device)
    sequence = sequence_of_tokens(lengths, inputs.logprobs.numel())
    difference = (inputs.logprobs.detach() - inputs.old_logprobs).double()
    mean = torch.zeros(lengths.numel(), dtype=torch.float64, device=lengths.device).index_add(0, sequence, difference)
    mean = (mean / lengths.clamp(min=1)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    held = mean.exp()[sequence].to(inputs.logprobs.dtype)
    ratio = held * torch.exp(inputs.logprobs - inputs.logprobs.detach())
    lower, upper = clip_bounds(inputs.advantages, algorithm.clip_low, algorithm.clip_high, None)
    return PolicyLossTerms(
        loss=-inputs.advantages * ratio.clamp(lower, upper),
        ratio=ratio,
        clipped=(held < lower) | (held > upper),
    )
