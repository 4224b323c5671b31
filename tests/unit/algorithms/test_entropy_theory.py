"""What docs/algorithm.md derives, against what the losses do: the relay on a token, and the first-order change of H."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_entropic.algorithms import entropic_term, policy_loss

TAU = 0.8
CLIPS = {"clip_low": 0.2, "clip_high": 0.2}


def loss_of(logprobs: Tensor, advantages: Tensor, weights: Tensor, alpha: float, tau: float) -> Tensor:
    """Loss with EntroPIC's term on-policy, each row counted `weights` times."""
    main = policy_loss(logprobs, logprobs.detach(), advantages, **CLIPS)
    term, _ = entropic_term(logprobs, main.ratio, advantages, tau=tau, **CLIPS)
    return (weights * (main.loss + alpha * term)).sum()


def bandit(alpha: float, rewarded: float, punished: float, steps: int = 250, rate: float = 0.3) -> list[float]:
    """Probabilities of one of two tokens whose expected positive and negative advantage are given, from 0.6 on."""
    logit = torch.tensor(0.4, dtype=torch.float64)
    found = []
    for _ in range(steps):
        free = logit.clone().requires_grad_()
        logprob = torch.nn.functional.logsigmoid(free).expand(2)
        found.append(float(logprob[0].detach().exp()))
        advantages, weights = torch.tensor([1.0, -1.0]), torch.tensor([rewarded, punished])
        loss_of(logprob, advantages.double(), weights.double(), alpha, TAU).backward()
        assert free.grad is not None
        logit = logit - rate * free.grad
    return found


def test_alpha_minus_one_holds_a_rewarded_token_at_tau_and_minus_a_half_does_not() -> None:
    """E+ > 3 E-: the drift above tau is (1 + alpha) E+ - (1 - alpha) E-, positive at -0.5 and negative at -1."""
    passed, held, free = (bandit(alpha, rewarded=0.8, punished=0.2) for alpha in (-0.5, -1.0, 0.0))
    assert passed[-1] > 0.9
    assert free[-1] > 0.95
    assert max(held[50:]) < TAU + 0.01
    assert min(held[50:]) > TAU - 0.02
    crossings = sum((one > TAU) != (other > TAU) for one, other in itertools.pairwise(held[50:]))
    assert crossings > 50, "it slides along tau, to and fro"


@pytest.mark.parametrize("rewarded", [0.55, 0.7, 0.9])
def test_the_smallest_alpha_that_holds_is_that_of_the_reaching_condition(rewarded: float) -> None:
    punished = 1.0 - rewarded
    needed = (rewarded - punished) / (rewarded + punished)
    assert bandit(-(needed + 0.05), rewarded, punished, rate=1.0)[-1] < TAU + 0.03
    assert bandit(-(needed - 0.05), rewarded, punished, rate=1.0)[-1] > TAU + 0.05


def entropy(logits: Tensor) -> float:
    return float(-(logits.softmax(-1) * logits.log_softmax(-1)).sum())


@pytest.mark.parametrize("seed", range(5))
def test_the_measured_change_of_entropy_is_drift_minus_gain_times_alpha(seed: int) -> None:
    """One context, the expectation over its tokens: b = -eta Cov_p(log p, p A), g = eta sum of p |A| (q - sum p q)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, generator=generator, dtype=torch.float64)
    p, logp, start = logits.softmax(-1), logits.log_softmax(-1), entropy(logits)
    advantages = torch.randn(7, generator=generator, dtype=torch.float64)
    advantages = advantages - (p * advantages).sum()
    between = p.sort().values[3:5]
    rate, tau = 1e-5, float(between.mean())
    drift = -rate * float((p * (logp + start) * p * advantages).sum())
    q = p * (logp + start)
    above = (p > tau).double()
    gain = rate * float((above * p * advantages.abs() * (q - (p * q).sum())).sum())
    for alpha in (-1.0, 0.0, 0.5):
        free = logits.clone().requires_grad_()
        loss_of(free.log_softmax(-1), advantages, p, alpha, tau).backward()
        assert free.grad is not None
        measured = entropy(logits - rate * free.grad) - start
        assert measured == pytest.approx(drift - gain * alpha, rel=1e-3, abs=1e-9)
