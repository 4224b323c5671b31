"""Correction for a policy that is not quite the one that sampled: engine numerics, and staleness in decoupled PPO."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_entropic.algorithms.losses.policy_loss import MAX_LOG_RATIO
from megatron_entropic.algorithms.token_sums import Sums, summed


def importance_ratios(old_logprobs: Tensor, rollout_logprobs: Tensor, level: str) -> Tensor:
    """Ratios pi_old / pi_rollout of ONE response's tokens, before any truncation; constants.

        token      exp(clamp(logp_old - logp_rollout, -20, 20)), each token's own
        sequence   exp(clamp(sum over the response, -20, 20)), the same for all its tokens

    Both log-probabilities must be of the same distribution up to numerics: same temperature, no top-p or top-k
    renormalisation on one side only.

    Args:
        old_logprobs: [R] log-probabilities that the policy's own score pass gives the sampled tokens.
        rollout_logprobs: [R] as the engine reported them.
        level: "token" or "sequence".

    Returns:
        [R] in the dtype of `old_logprobs`, without gradient.

    Raises:
        ValueError: shapes differ or the level is unknown.
    """
    if old_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(f"policy log-probs {tuple(old_logprobs.shape)} but rollout's {tuple(rollout_logprobs.shape)}")
    difference = (old_logprobs - rollout_logprobs).detach()
    if level == "sequence":
        difference = difference.sum().expand_as(difference)
    elif level != "token":
        raise ValueError(f"unknown level {level!r} of importance correction: token or sequence")
    return torch.exp(difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def importance_weights(ratios: Tensor, method: str, cap: float) -> Tensor:
    """Weights of the policy loss from the ratios w of `importance_ratios`.

        tis   min(w, cap)                         truncated: F. Yao et al., "Your efficient RL framework secretly brings
                                                  you off-policy RL training", 2025
        mis   w where 1 / cap <= w <= cap, else 0 masked: a token (or response) that is too far off teaches nothing

    Args:
        ratios: [T].
        method: "tis" or "mis".
        cap: > 1.

    Raises:
        ValueError: the method is unknown, or cap <= 1.
    """
    if not cap > 1:
        raise ValueError(f"importance cap must be > 1, not {cap}")
    if method == "tis":
        return ratios.clamp(max=cap)
    if method == "mis":
        return ratios.masked_fill((ratios > cap) | (ratios < 1.0 / cap), 0.0)
    raise ValueError(f"unknown importance correction {method!r}: tis or mis")


@dataclass(frozen=True, slots=True)
class Correction:
    """One ratio that is corrected for, above / below, both fields of a scored `types.Sequence`."""

    method: str
    """Name of the method, tis or mis."""
    above: str
    below: str
    prefix: str
    """Beginning of the names of its metrics."""


def corrections(importance: str, staleness: str) -> list[Correction]:
    """The ratios that `rollout.importance_correction` and `staleness_correction` ask to correct for.

    pi_old / pi_rollout is pi_old / pi_v x pi_v / pi_rollout, v being the weights that sampled a token. Where the first,
    staleness, has a correction of its own, `importance` is that of the second alone, else of both.
    """
    split = staleness != "none"
    found = []
    if importance != "none":
        found.append(
            Correction(importance, "own_logprobs" if split else "old_logprobs", "rollout_logprobs", "importance/")
        )
    if split:
        found.append(Correction(staleness, "old_logprobs", "own_logprobs", "importance/staleness_"))
    return found


def importance_metrics(
    ratios: Iterable[Tensor], method: str, cap: float, prefix: str = "importance/"
) -> dict[str, float]:
    """Metrics of the rollout correction, from the ratios of all responses before truncation; names begin by `prefix`.

    importance/ratio_mean, importance/ratio_max   of w; the mean is 1 when both policies agree
    importance/cut_fraction                       share of tokens whose w was truncated or masked
    importance/effective_fraction                 (sum w)^2 / (T sum w^2): share of the sample that is left
    """

    def measure(sums: Sums, ratios: Tensor) -> None:
        raw = ratios.double()
        sums.add("ratio", raw)
        sums.add_highest("ratio", raw)
        sums.add("cut", (importance_weights(raw, method, cap) != raw).double())
        sums.add("square", raw.square())

    sums = summed(((ratio,) for ratio in ratios), measure)
    tokens, total = sums.count("ratio"), sums.total("ratio")
    return {
        f"{prefix}ratio_mean": sums.mean("ratio", empty=1.0),
        f"{prefix}ratio_max": sums.highest("ratio", empty=1.0),
        f"{prefix}cut_fraction": sums.mean("cut", empty=0.0),
        f"{prefix}effective_fraction": total * total / (tokens * sums.total("square")) if tokens else 1.0,
    }


# How far the engine's log-probabilities are from the policy's, on the same tokens and weights.


def mismatch_metrics(policy_logprobs: Tensor, rollout_logprobs: Tensor, prefix: str = "mismatch/") -> dict[str, float]:
    """Metrics of the mismatch over T tokens sampled by the engine, with d = logp_policy - logp_rollout.

        mismatch/logprob_abs_mean               mean |d|, nats
        mismatch/logprob_abs_max                max |d|, nats
        mismatch/k3                             mean exp(d) - 1 - d, estimates KL(rollout || policy), nats, >= 0
        mismatch/token_probability_error_ratio  mean exp(|d|), NeMo-RL's token_mult_prob_error: 1 is equality, and it
                                                treats more than 1.05 as a bug

    Args:
        policy_logprobs: [T] from the policy's score pass at the rollout temperature.
        rollout_logprobs: [T] as the engine reported them.
        prefix: beginning of the names.

    Returns:
        Four floats (float64 arithmetic); the values of equality for T = 0. |d| is bounded at 20 inside exp.

    Raises:
        ValueError: shapes differ.
    """
    if policy_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(f"policy log-probs {tuple(policy_logprobs.shape)}, rollout's {tuple(rollout_logprobs.shape)}")
    return mismatch_metrics_of([(policy_logprobs.flatten(), rollout_logprobs.flatten())], prefix)


def mismatch_metrics_of(sequences: Iterable[tuple[Tensor, Tensor]], prefix: str = "mismatch/") -> dict[str, float]:
    """`mismatch_metrics` over the tokens of all sequences, each a pair of policy's and rollout's log-probs, [R]."""

    def measure(sums: Sums, policy: Tensor, rollout: Tensor) -> None:
        d = policy.detach().double().sub_(rollout.detach().double())
        distance, bounded = d.abs(), d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        sums.add("distance", distance)
        sums.add_highest("distance", distance)
        sums.add("k3", torch.expm1(bounded).sub_(d))
        sums.add("error", bounded.abs_().exp_())

    sums = summed(sequences, measure)
    return {
        f"{prefix}logprob_abs_mean": sums.mean("distance", empty=0.0),
        f"{prefix}logprob_abs_max": sums.highest("distance", empty=0.0),
        f"{prefix}k3": sums.mean("k3", empty=0.0),
        f"{prefix}token_probability_error_ratio": sums.mean("error", empty=1.0),
    }
