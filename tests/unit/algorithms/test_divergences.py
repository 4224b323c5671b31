"""KL penalty, importance correction and the mismatch panel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_entropic.algorithms import (
    importance_metrics,
    importance_ratios,
    importance_weights,
    kl_penalty,
    mismatch_metrics,
)


def categorical(seed: int) -> Tensor:
    return torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def expected_penalty(policy: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Mean of the estimator over the policy's own samples, sampling itself carrying no gradient: as in training."""
    logp, ref = policy.log_softmax(0), reference.log_softmax(0)
    return (logp.exp().detach() * kl_penalty(logp, ref, estimator)).sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.log_softmax(0).exp() * (p.log_softmax(0) - q.log_softmax(0))).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_values_are_unbiased(estimator: str) -> None:
    policy, reference = categorical(0), categorical(1)
    torch.testing.assert_close(expected_penalty(policy, reference, estimator), kl(policy, reference))


def test_values_by_hand() -> None:
    logp, ref = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.5, -1.0, -1.0])
    assert kl_penalty(logp, ref, "k1").tolist() == pytest.approx([0.5, 0, -2])
    assert kl_penalty(logp, ref, "k2").tolist() == pytest.approx([0.125, 0, 2])
    assert kl_penalty(logp, ref, "k3").tolist() == pytest.approx([math.exp(-0.5) - 0.5, 0, math.exp(2) - 3], abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "direction"), [("k1", "policy, reference"), ("k2", "policy, reference"), ("k3", "reference, policy")]
)
def test_mean_gradient_is_that_of_a_divergence(estimator: str, direction: str) -> None:
    """k1 and k2: KL(pi || ref); k3: KL(ref || pi). A k1 differentiated as it stands would have the mean gradient 0."""
    policy, reference = categorical(2).requires_grad_(), categorical(3)
    pair = (policy, reference) if direction == "policy, reference" else (reference, policy)
    (want,) = torch.autograd.grad(kl(*pair), policy)
    (got,) = torch.autograd.grad(expected_penalty(policy, reference, estimator), policy)
    torch.testing.assert_close(got, want)
    assert want.abs().max() > 0.01


def test_k3_of_a_far_reference_is_finite() -> None:
    logp = torch.tensor([-500.0], requires_grad=True)
    penalty = kl_penalty(logp, torch.zeros(1), "k3")
    penalty.sum().backward()
    assert bool(torch.isfinite(penalty).all())
    assert bool(torch.isfinite(logp.grad).all())


def test_reference_gets_no_gradient() -> None:
    logp, ref = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    for estimator in ("k1", "k2", "k3"):
        kl_penalty(logp, ref, estimator).sum().backward()
    assert ref.grad is None


def test_kl_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="unknown KL estimator"):
        kl_penalty(torch.zeros(2), torch.zeros(2), "k4")
    with pytest.raises(ValueError, match="reference"):
        kl_penalty(torch.zeros(2), torch.zeros(1), "k1")


def test_importance_correction_by_hand() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, -1000.0, 0.0], requires_grad=True)
    rollout = torch.tensor([-1.0, -1.5, -2.5, 0.0, -1000.0])
    ratios = importance_ratios(old, rollout, "token")
    assert not ratios.requires_grad
    assert importance_weights(ratios, "tis", 2.0).tolist() == pytest.approx([1, math.exp(0.5), 2, math.exp(-20), 2])
    assert importance_weights(ratios, "mis", 2.0).tolist() == pytest.approx([1, math.exp(0.5), 0, 0, 0])
    whole = importance_ratios(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.2]), "sequence")
    assert whole.tolist() == pytest.approx([math.exp(0.7)] * 2)
    assert importance_weights(whole, "tis", 2.0).tolist() == pytest.approx([2, 2])
    for bad, message in (
        (lambda: importance_weights(ratios, "tis", 1.0), "cap"),
        (lambda: importance_weights(ratios, "cut", 2.0), "tis or mis"),
        (lambda: importance_ratios(rollout, rollout[:1], "token"), "rollout"),
        (lambda: importance_ratios(rollout, rollout, "word"), "level"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_importance_metrics_are_of_the_ratios_before_truncation() -> None:
    metrics = importance_metrics([torch.tensor([1.0, 3.0]), torch.tensor([0.25, 0.75])], "tis", 2.0)
    assert metrics == pytest.approx(
        {
            "importance/ratio_mean": 1.25,
            "importance/ratio_max": 3.0,
            "importance/cut_fraction": 0.25,
            "importance/effective_fraction": 25 / (4 * (1 + 9 + 0.0625 + 0.5625)),
        }
    )
    assert importance_metrics([torch.tensor([1.0, 3.0, 0.25])], "mis", 2.0)["importance/cut_fraction"] == pytest.approx(
        2 / 3
    )
    assert importance_metrics([], "tis", 2.0)["importance/ratio_mean"] == 1.0


def test_mismatch_by_hand() -> None:
    metrics = mismatch_metrics(torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-1.0, -2.5, -2.0, -4.0]))
    assert metrics == pytest.approx(
        {
            "mismatch/logprob_abs_mean": 1.5 / 4,
            "mismatch/logprob_abs_max": 1.0,
            "mismatch/k3": ((math.exp(0.5) - 1.5) + (math.exp(-1) - 0)) / 4,
            "mismatch/token_probability_error_ratio": (2 + math.exp(0.5) + math.exp(1)) / 4,
        }
    )


def test_mismatch_of_small_differences_is_not_rounded_away() -> None:
    """k3 of 1e-5 is 5e-11: exp(d) - 1 - d in float32 would be 0 or noise."""
    rollout = torch.full((100,), -2.0, dtype=torch.float64)
    metrics = mismatch_metrics(rollout + 1e-5, rollout)
    assert metrics["mismatch/k3"] == pytest.approx(5e-11, rel=1e-3)


def test_mismatch_of_equals_and_of_nothing() -> None:
    equality = {
        "mismatch/logprob_abs_mean": 0.0,
        "mismatch/logprob_abs_max": 0.0,
        "mismatch/k3": 0.0,
        "mismatch/token_probability_error_ratio": 1.0,
    }
    assert mismatch_metrics(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0])) == equality
    assert mismatch_metrics(torch.zeros(0), torch.zeros(0)) == equality
    with pytest.raises(ValueError, match="rollout"):
        mismatch_metrics(torch.zeros(2), torch.zeros(3))
