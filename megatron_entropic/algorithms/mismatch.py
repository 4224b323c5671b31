"""How far the engine's log-probabilities are from the policy's, on the same tokens and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_entropic.algorithms.losses.policy_loss import MAX_LOG_RATIO


def mismatch_metrics(policy_logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, float]:
    """The mismatch panel over T tokens sampled by the engine, with d = logp_policy - logp_rollout.

        mismatch/logprob_abs_mean               mean |d|, nats
        mismatch/logprob_abs_max                max |d|, nats
        mismatch/k3                             mean exp(d) - 1 - d, estimates KL(rollout || policy), nats, >= 0
        mismatch/token_probability_error_ratio  mean exp(|d|), NeMo-RL's token_mult_prob_error: 1 is equality, and it
                                                treats more than 1.05 as a bug

    Args:
        policy_logprobs: [T] from the policy's score pass at the rollout temperature.
        rollout_logprobs: [T] as the engine reported them.

    Returns:
        Four floats (float64 arithmetic); the values of equality for T = 0. |d| is bounded at 20 inside exp.

    Raises:
        ValueError: shapes differ.
    """
    if policy_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(f"policy log-probs {tuple(policy_logprobs.shape)}, rollout's {tuple(rollout_logprobs.shape)}")
    d = (policy_logprobs.detach().double() - rollout_logprobs.detach().double()).flatten()
    if d.numel() == 0:
        d = torch.zeros(1, dtype=torch.float64)
    bounded = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "mismatch/logprob_abs_mean": float(d.abs().mean()),
        "mismatch/logprob_abs_max": float(d.abs().max()),
        "mismatch/k3": float((torch.expm1(bounded) - d).mean()),
        "mismatch/token_probability_error_ratio": float(bounded.abs().exp().mean()),
    }
