"""Advantages of responses from their rewards, with the other responses to the same prompt as baseline.

r_pg is the reward of response g of G to prompt p; mean_p and std_p (unbiased, divisor G - 1) are over its group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_entropic.config.names import ADVANTAGES

EPSILON = 1e-6
"""Number added to standard deviations, as verl does."""

POSITIVE_WEIGHT = 0.1
"""Advantage of a correct response in w_reinforce, lambda of arXiv 2506.01347."""


def advantages(method: str, rewards: Tensor) -> Tensor:
    """Compute one advantage per response; every token of the response gets it.

        grpo                         (r_pg - mean_p) / (std_p + 1e-6)             DeepSeekMath, arXiv 2402.03300
        grpo_no_std                  r_pg - mean_p                                Dr. GRPO, arXiv 2503.20783
        rloo                         r_pg - mean of the group's other rewards     arXiv 2402.14740
        reinforce_plus_plus_baseline (d_pg - mean(d)) / (std(d) + 1e-6), d_pg = r_pg - mean_p, mean and std over the
                                     whole batch                                  REINFORCE++-baseline, arXiv 2501.03262
        nsr                          0 where r_pg > 0, else -1                    RLVR-Decomposed, arXiv 2506.01347
        w_reinforce                  0.1 where r_pg > 0, else -1                  the same, with lambda = 0.1
        wapo                         max(r_pg - mean_p, 0)                        WAPO, arXiv 2606.16154

    WAPO trains on winners only; its code clips ratios from above alone, at 1 + 9 (`clip_high: 9`), and divides by the
    response budget (`seq-mean-token-sum-norm`).

    The batch statistics of reinforce_plus_plus_baseline are over responses, as in the paper's formula (verl takes them
    over tokens, so long responses weigh more there).

    A group whose rewards are all equal gets exactly 0 in every method but nsr and w_reinforce, which have no baseline:
    rounding in the mean, divided by a standard deviation of almost 0, would otherwise train on noise, and "no token had
    A != 0" could never be seen.

    Args:
        method: one of the names above.
        rewards: [n_prompts, samples_per_prompt], any floating dtype; the arithmetic is float64.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: unknown method, wrong shape, a single sample per prompt, or a reward that is not finite.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"advantages need rewards [n_prompts, samples_per_prompt >= 2], got {tuple(rewards.shape)}: "
            "the baseline is the other samples of the same prompt"
        )
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("a reward is not finite")
    r = rewards.to(torch.float64)
    centred = r - r.mean(dim=1, keepdim=True)
    equal = r.amax(dim=1, keepdim=True) == r.amin(dim=1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)
    samples = r.shape[1]
    if method == "grpo":
        result = centred / (r.std(dim=1, keepdim=True) + EPSILON)
    elif method == "grpo_no_std":
        result = centred
    elif method == "wapo":
        result = centred.clamp(min=0.0)
    elif method == "rloo":
        result = centred * (samples / (samples - 1))
    elif method == "reinforce_plus_plus_baseline":
        result = ((centred - centred.mean()) / (centred.std() + EPSILON)).masked_fill(equal, 0.0)
    elif method in ("nsr", "w_reinforce"):
        result = torch.where(r > 0, POSITIVE_WEIGHT if method == "w_reinforce" else 0.0, -1.0)
    else:
        raise ValueError(f"unknown advantage {method!r}: {', '.join(ADVANTAGES)}")
    return result.to(torch.float32)
