"""The clipped surrogate, the EntroPIC term and both together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_entropic.algorithms import entropic_term, policy_loss, token_weights

CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}


def batch(tokens: int = 200, *, seed: int = 0, spread: float = 0.5, high: float = 0.5) -> tuple[Tensor, ...]:
    """logp (leaf), logp_old, advantages with zeros among them; a part `high` of the tokens is above tau = 0.95."""
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand(tokens, generator=generator)
    is_high = torch.rand(tokens, generator=generator) < high
    probability = torch.where(is_high, 0.951 + 0.048 * probability, 0.01 + 0.93 * probability)
    logprobs = probability.log()
    old = logprobs + spread * torch.randn(tokens, generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    advantages[::7] = 0
    return logprobs.requires_grad_(), old, advantages


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    return result


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_equals_the_published_form(dual_clip: float | None) -> None:
    """max(-A r, -A clamp(r)), and for A < 0 its minimum with -A c; clipped where the maximum is the clamped one."""
    logprobs, old, advantages = batch()
    terms = policy_loss(logprobs, old, advantages, dual_clip=dual_clip, **CLIP)
    ratio = (logprobs - old).exp()
    plain, clamped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.28)
    want = torch.maximum(plain, clamped)
    held = clamped > plain
    if dual_clip is not None:
        bound = -advantages * dual_clip
        held |= (advantages < 0) & (bound < want)
        want = torch.where(advantages < 0, torch.minimum(want, bound), want)
    torch.testing.assert_close(terms.loss, want)
    torch.testing.assert_close(terms.ratio, ratio)
    assert torch.equal(terms.clipped, held)
    assert bool(terms.clipped.any())
    assert not bool(terms.clipped.all())
    torch.testing.assert_close(gradient(terms.loss, logprobs), torch.where(held, 0.0, -advantages * ratio).detach())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),
        (1.5, 2.0, -2.56, 0.0, True),  # clip-higher
        (0.5, 2.0, -1.0, -1.0, False),
        (0.5, -2.0, 1.6, 0.0, True),
        (1.5, -2.0, 3.0, 3.0, False),
        (4.0, -2.0, 6.0, 0.0, True),  # dual clip
        (4.0, 0.0, 0.0, 0.0, False),
    ],
)
def test_by_hand(ratio: float, advantage: float, loss: float, slope: float, clipped: bool) -> None:
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    terms = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), dual_clip=3.0, **CLIP)
    assert terms.loss.item() == pytest.approx(loss)
    assert gradient(terms.loss, logprobs).item() == pytest.approx(slope)
    assert terms.clipped.item() is clipped


def test_on_policy_gradient_is_exactly_the_advantage() -> None:
    """At ratio 1 and on the clip bounds themselves the gradient is whole; a maximum of two equal values halves it."""
    logprobs, _, advantages = batch()
    terms = policy_loss(logprobs, logprobs.detach().clone(), advantages, **CLIP)
    assert torch.equal(gradient(terms.loss, logprobs), -advantages)
    assert torch.equal(terms.ratio, torch.ones_like(advantages))


def test_extreme_ratios_stay_finite() -> None:
    logprobs = torch.tensor([0.0, -500.0, -1e-3], requires_grad=True)
    terms = policy_loss(logprobs, torch.tensor([-900.0, 0.0, 0.0]), torch.tensor([-1.0, 1.0, 1.0]), **CLIP)
    assert bool(torch.isfinite(terms.loss).all())
    assert terms.ratio[0].item() == pytest.approx(math.exp(20))
    assert terms.ratio[1].item() == pytest.approx(math.exp(-20))
    assert bool(torch.isfinite(gradient(terms.loss, logprobs)).all())


def test_importance_weights_scale_loss_and_term_and_get_no_gradient() -> None:
    logprobs, old, advantages = batch()
    weights = (torch.rand(len(old)) + 0.5).requires_grad_()
    plain = policy_loss(logprobs, old, advantages, **CLIP)
    weighted = policy_loss(logprobs, old, advantages, importance_weights=weights, **CLIP)
    torch.testing.assert_close(weighted.loss, plain.loss * weights.detach())
    options = {"tau": 0.95, **CLIP}
    term, _ = entropic_term(logprobs, plain.ratio, advantages, **options)
    weighted_term, _ = entropic_term(logprobs, plain.ratio, advantages, importance_weights=weights, **options)
    torch.testing.assert_close(weighted_term, term * weights.detach())
    (weighted.loss.sum() + weighted_term.sum()).backward()
    assert weights.grad is None


@pytest.mark.parametrize("ratio_clip", ["none", "ppo"])
def test_alpha_zero_is_bit_equal_to_the_base_loss(ratio_clip: str) -> None:
    logprobs, old, advantages = batch()
    weights = token_weights(
        "token-mean", torch.tensor([150, 50]), global_tokens=640, global_sequences=8, max_response_tokens=512
    )
    terms = policy_loss(logprobs, old, advantages, dual_clip=3.0, **CLIP)
    term, high = entropic_term(logprobs, terms.ratio, advantages, tau=0.95, ratio_clip=ratio_clip, **CLIP)
    base = (weights * terms.loss).sum()
    both = base + 0.0 * (weights * term).sum()
    assert bool(high.any())
    assert torch.equal(both, base)
    assert torch.equal(gradient(both, logprobs), gradient(base, logprobs))


@pytest.mark.parametrize("alpha", [-1.0, -0.3, 0.4, 1.0])
def test_effective_weights_are_one_plus_and_one_minus_alpha(alpha: float) -> None:
    """All pi > tau, ratio 1, all tokens in the denominator: the paper's weights."""
    logprobs, _, advantages = batch(high=1.0)
    terms = policy_loss(logprobs, logprobs.detach().clone(), advantages, **CLIP)
    term, high = entropic_term(logprobs, terms.ratio, advantages, tau=0.95, **CLIP)
    assert bool(high.all())
    base, both = gradient(terms.loss, logprobs), gradient(terms.loss + alpha * term, logprobs)
    factor = torch.where(advantages > 0, 1 + alpha, 1 - alpha)
    torch.testing.assert_close(both, base * factor, rtol=1e-6, atol=0)


@given(st.floats(-1, 1), st.integers(0, 99), st.sampled_from([None, 1.3, 3.0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_ppo_ratio_clip_reweights_the_main_loss_at_any_ratio(
    alpha: float, seed: int, dual_clip: float | None, weighted: bool
) -> None:
    logprobs, old, advantages = batch(seed=seed, spread=1.0)
    shared = {"dual_clip": dual_clip, "importance_weights": torch.rand(len(old)) if weighted else None, **CLIP}
    terms = policy_loss(logprobs, old, advantages, **shared)
    term, high = entropic_term(logprobs, terms.ratio, advantages, tau=0.95, ratio_clip="ppo", **shared)
    factor = torch.where(high, 1 + alpha * advantages.sign(), 1.0)
    torch.testing.assert_close(terms.loss + alpha * term, terms.loss * factor, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        gradient(terms.loss + alpha * term, logprobs), gradient(terms.loss, logprobs) * factor, rtol=1e-4, atol=1e-6
    )
    assert bool((gradient(term, logprobs)[terms.clipped] == 0).all())


def test_raw_ratio_keeps_its_gradient_where_the_clip_is_active() -> None:
    logprobs, old, advantages = batch(spread=1.0)
    terms = policy_loss(logprobs, old, advantages, **CLIP)
    term, high = entropic_term(logprobs, terms.ratio, advantages, tau=0.95, **CLIP)
    want = torch.where(high, -advantages.abs() * (logprobs - old).exp(), 0.0).detach()
    torch.testing.assert_close(term.detach(), want)
    torch.testing.assert_close(gradient(term, logprobs), want)
    assert bool((gradient(term, logprobs)[terms.clipped & high] != 0).any())


def test_threshold_is_strict() -> None:
    """p == tau is out, whether log(0.95) was computed in float32 or float64; its neighbour above is in."""
    equal = torch.tensor([math.log(0.95), 0.0, -1.0], dtype=torch.float32)
    above = torch.nextafter(equal[0], torch.tensor(0.0))
    logprobs = torch.stack([equal[0], torch.tensor(0.95).log(), above, equal[1], equal[2]])
    _, high = entropic_term(logprobs, torch.ones(5), torch.ones(5), tau=0.95, **CLIP)
    assert high.tolist() == [False, False, True, True, False]


def test_threshold_zero_selects_every_possible_token() -> None:
    logprobs = torch.tensor([0.0, -50.0, -torch.inf])
    _, high = entropic_term(logprobs, torch.ones(3), torch.ones(3), tau=0.0, **CLIP)
    assert high.tolist() == [True, True, False]


def test_nothing_to_adjust_is_zero_and_finite() -> None:
    """No high-probability token; or no advantage at all."""
    for high, scale in ((0.0, 1.0), (1.0, 0.0)):
        logprobs, old, advantages = batch(high=high)
        terms = policy_loss(logprobs, old, advantages * scale, **CLIP)
        term, _ = entropic_term(logprobs, terms.ratio, advantages * scale, tau=0.95, **CLIP)
        assert bool((term == 0).all())
        assert bool((gradient(term, logprobs) == 0).all())
        assert bool(torch.isfinite(terms.loss).all())


def test_no_tokens() -> None:
    empty = torch.zeros(0)
    terms = policy_loss(empty, empty, empty, **CLIP)
    term, high = entropic_term(empty, terms.ratio, empty, tau=0.95, **CLIP)
    assert terms.loss.shape == term.shape == high.shape == (0,)


def test_gradients_against_finite_differences() -> None:
    """In float64, at points away from the kinks."""
    old = torch.tensor([-0.02, -0.03, -0.04, -0.01, -1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0, 1.0], dtype=torch.float64)
    leaf = (old + torch.tensor([0.01, -0.01, 0.015, 0.005, 0.4], dtype=torch.float64)).requires_grad_()

    def total(logprobs: Tensor) -> Tensor:
        terms = policy_loss(logprobs, old, advantages, dual_clip=3.0, **CLIP)
        term, _ = entropic_term(logprobs, terms.ratio, advantages, tau=0.95, ratio_clip="ppo", dual_clip=3.0, **CLIP)
        return terms.loss - 0.4 * term

    assert torch.autograd.gradcheck(total, (leaf,))


def test_bad_input_is_refused() -> None:
    three, four = torch.zeros(3), torch.zeros(4)
    with pytest.raises(ValueError, match="must all be"):
        policy_loss(three, four, three, **CLIP)
    with pytest.raises(ValueError, match="must all be"):
        policy_loss(three, three, three[:1], **CLIP)
    with pytest.raises(ValueError, match="must all be"):
        policy_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2), **CLIP)
    with pytest.raises(ValueError, match="dual_clip"):
        policy_loss(three, three, three, dual_clip=1.0, **CLIP)
    with pytest.raises(ValueError, match="tau"):
        entropic_term(three, three, three, tau=1.0, **CLIP)
    with pytest.raises(ValueError, match="ratio_clip"):
        entropic_term(three, three, three, tau=0.5, ratio_clip="both", **CLIP)
