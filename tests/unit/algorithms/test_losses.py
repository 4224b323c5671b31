"""Policy losses: by hand, against plain policy gradient, and independent of how tokens are cut up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_entropic.algorithms import POLICY_LOSSES, PolicyLossTerms, find_policy_loss
from megatron_entropic.algorithms.losses import BatchTokens, LossInputs, PolicyLoss
from megatron_entropic.config.algorithm import AlgorithmConfig

LENGTHS = torch.tensor([4, 1, 7, 3])
N = int(LENGTHS.sum())


class Alone:
    """Reductions of a single replica, or of parts that are known in advance."""

    def __init__(self, *others: Tensor) -> None:
        self.others = others

    def sum(self, values: Tensor) -> Tensor:
        return values.clone()

    def largest(self, values: Tensor, count: int) -> Tensor:
        return values.double().topk(min(count, values.numel())).values


def algorithm(**changes: Any) -> AlgorithmConfig:
    return AlgorithmConfig(**changes)


def random_inputs(seed: int = 0, distance: float = 0.4) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(N, generator=generator)
    logprobs = (old + distance * torch.randn(N, generator=generator)).requires_grad_()
    advantages = torch.randn(N, generator=generator)
    advantages[3] = 0.0
    return LossInputs(logprobs, old, advantages, lengths=LENGTHS)


def planned(inputs: LossInputs, loss: PolicyLoss, config: AlgorithmConfig) -> LossInputs:
    if loss.plan is None:
        return inputs
    generator = torch.Generator().manual_seed(9)
    tokens = BatchTokens(
        logprobs=inputs.logprobs.detach(),
        entropies=torch.rand(N, generator=generator),
        old_logprobs=inputs.old_logprobs,
        advantages=inputs.advantages,
        keys=torch.rand(N, dtype=torch.float64, generator=generator),
    )
    return replace(inputs, marks=loss.plan(tokens, Alone(), config))


def gradient(terms: PolicyLossTerms, inputs: LossInputs, weights: Tensor | None = None) -> Tensor:
    total = (terms.loss if weights is None else terms.loss * weights).sum()
    return torch.autograd.grad(total, inputs.logprobs)[0]


def by_hand(logp: list[float], old: list[float], advantage: list[float], **more: Any) -> LossInputs:
    return LossInputs(torch.tensor(logp, requires_grad=True), torch.tensor(old), torch.tensor(advantage), **more)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_at_ratio_one_it_is_plain_policy_gradient(name: str) -> None:
    """Weights are equal within a sequence, as in every aggregation; what a plan marks is treated otherwise."""
    inputs = random_inputs()
    inputs = replace(inputs, old_logprobs=inputs.logprobs.detach().clone())
    loss, config = POLICY_LOSSES[name], algorithm()
    inputs = planned(inputs, loss, config)
    terms = loss.function(inputs, config)
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0]).repeat_interleave(LENGTHS)
    expected = -inputs.advantages * weights
    if name == "steer":
        expected = expected * inputs.marks
    if name == "clip_cov":
        expected = expected.masked_fill(inputs.marks > 0, 0.0)
    torch.testing.assert_close(gradient(terms, inputs, weights), expected)
    torch.testing.assert_close(terms.ratio.detach(), torch.ones(N))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_loss_of_a_sequence_does_not_depend_on_its_neighbours(name: str) -> None:
    loss, config = POLICY_LOSSES[name], algorithm()
    inputs = planned(random_inputs(1), loss, config)
    whole = loss.function(inputs, config)
    begin = 0
    for length in LENGTHS.tolist():
        cut = slice(begin, begin + length)
        begin += length
        some = LossInputs(
            inputs.logprobs[cut],
            inputs.old_logprobs[cut],
            inputs.advantages[cut],
            None if inputs.marks is None else inputs.marks[cut],
            torch.tensor([length]),
        )
        part = loss.function(some, config)
        torch.testing.assert_close(part.loss, whole.loss[cut], rtol=1e-6, atol=1e-7)
        assert torch.equal(part.clipped, whole.clipped[cut])


def test_reinforce_by_hand() -> None:
    inputs = by_hand([-1.0, -0.5], [-3.0, -0.5], [2.0, -1.0])
    terms = POLICY_LOSSES["reinforce"].function(inputs, algorithm())
    assert terms.loss.tolist() == pytest.approx([2.0, -0.5])
    assert gradient(terms, inputs).tolist() == pytest.approx([-2.0, 1.0]), "whatever the ratio is"


def test_cispo_by_hand() -> None:
    inputs = by_hand([0.0, -2.0, -1.0], [-1.0, -1.0, -1.1], [1.0, -2.0, 1.0])
    terms = POLICY_LOSSES["cispo"].function(inputs, algorithm(clip_low=0.3, clip_high=0.2))
    weights = [1.2, 0.7, math.exp(0.1)]
    assert gradient(terms, inputs).tolist() == pytest.approx([-1.2, 1.4, -math.exp(0.1)])
    assert terms.loss.tolist() == pytest.approx([0.0, weights[1] * 2 * -2.0, weights[2]])
    assert terms.clipped.tolist() == [True, True, False]


def test_ce_gppo_by_hand() -> None:
    logp, old = [math.log(0.5), math.log(2.0), math.log(1.1), math.log(4.0)], [0.0] * 4
    inputs = by_hand(logp, old, [-1.0, 1.0, -1.0, -1.0])
    terms = POLICY_LOSSES["ce_gppo"].function(inputs, algorithm())
    assert terms.loss.tolist() == pytest.approx([0.75 * 0.8, -1.2, 1.1, 3.0])
    assert gradient(terms, inputs).tolist() == pytest.approx([0.75 * 0.8, -1.2, 1.1, 0.0])
    assert terms.clipped.tolist() == [True, True, False, False]


def test_gspo_by_hand() -> None:
    """Two sequences: mean differences 0.1 (inside) and 0.5 (beyond 1.2, A > 0: held)."""
    inputs = by_hand([0.3, -0.1, 0.5], [0.0, 0.0, 0.0], [2.0, 2.0, 1.0], lengths=torch.tensor([2, 1]))
    terms = POLICY_LOSSES["gspo"].function(inputs, algorithm())
    s = math.exp(0.1)
    assert terms.loss.tolist() == pytest.approx([-2 * s, -2 * s, -1.2])
    assert gradient(terms, inputs).tolist() == pytest.approx([-2 * s, -2 * s, 0.0])
    assert terms.clipped.tolist() == [False, False, True]


def test_gspo_gradient_is_that_of_the_sequence_ratio() -> None:
    """With weights 1 / n of a sequence: d/dlogp of -A exp(mean difference)."""
    inputs = random_inputs(2, distance=0.05)
    terms = POLICY_LOSSES["gspo"].function(replace(inputs, advantages=torch.ones(N)), algorithm(clip_high=9.0))
    found = gradient(terms, inputs, (1.0 / LENGTHS).repeat_interleave(LENGTHS))
    pieces = (inputs.logprobs - inputs.old_logprobs).split(LENGTHS.tolist())
    (expected,) = torch.autograd.grad(-sum(piece.mean().exp() for piece in pieces), inputs.logprobs)
    torch.testing.assert_close(found, expected)


def batch(logp: list[float], advantage: list[float], **more: Tensor) -> BatchTokens:
    zeros = torch.zeros(len(logp))
    fields = {"entropies": zeros, "old_logprobs": torch.tensor(logp), "keys": zeros.double(), **more}
    return BatchTokens(logprobs=torch.tensor(logp), advantages=torch.tensor(advantage), **fields)


def test_kl_cov_by_hand() -> None:
    """Means -1 and 0; covariances 1, -0.5, 0.5, 1.2: the largest quarter is the last token."""
    config = algorithm(loss_options={"covariance_fraction": 0.25, "kl_cov_coefficient": 0.5})
    loss = POLICY_LOSSES["kl_cov"]
    marks = loss.plan(batch([0.0, -0.5, -0.5, -3.0], [1.0, -1.0, 1.0, -1.0]), Alone(), config)
    assert marks.tolist() == [0, 0, 0, 1]
    inputs = by_hand([0.0, -0.5, -0.5, -3.0], [0.0, -0.5, -0.5, -3.2], [1.0, -1.0, 1.0, -1.0], marks=marks)
    terms = loss.function(inputs, config)
    assert terms.loss.tolist() == pytest.approx([-1, 1, -1, math.exp(0.2) + 0.5 * 0.2])
    assert gradient(terms, inputs).tolist() == pytest.approx([-1, 1, -1, math.exp(0.2) + 0.5])


def test_kl_cov_marks_nothing_where_no_token_has_an_advantage() -> None:
    config = algorithm(loss_options={"covariance_fraction": 0.25})
    tokens = batch([0.0, -0.5, -0.5, -3.0], [0.0] * 4)
    assert POLICY_LOSSES["kl_cov"].plan(tokens, Alone(), config).tolist() == [0] * 4


def test_clip_cov_draws_from_the_band_by_the_keys() -> None:
    config = algorithm(loss_options={"covariance_fraction": 0.25, "clip_cov_low": 0.4, "clip_cov_high": 1.5})
    loss = POLICY_LOSSES["clip_cov"]
    keys = torch.tensor([0.3, 0.9, 0.8, 0.1], dtype=torch.float64)
    tokens = batch([0.0, -0.5, -0.5, -3.0], [1.0, -1.0, 1.0, -1.0], keys=keys)
    marks = loss.plan(tokens, Alone(), config)
    assert marks.tolist() == [0, 0, 1, 0], "0.9 is not in the band"
    inputs = by_hand([0.0, -0.5, -0.5, -3.0], [0.0, -0.5, -0.5, -3.0], [1.0, -1.0, 1.0, -1.0], marks=marks)
    terms = loss.function(inputs, config)
    assert terms.loss.tolist() == [-1, 1, 0, 1]
    assert terms.clipped.tolist() == [False, False, True, False]
    nothing = algorithm(loss_options={"clip_cov_low": 50, "clip_cov_high": 60})
    assert loss.plan(tokens, Alone(), nothing).tolist() == [0] * 4


def test_steer_by_hand() -> None:
    """omega = |A / p p (1 - p) (log p + H)| = |A| (1 - p) |log p + H| with p_old = p."""
    config, loss = algorithm(), POLICY_LOSSES["steer"]
    logp = [math.log(0.5), math.log(0.5), math.log(0.9)]
    entropies = torch.tensor([0.2, 0.2, 0.3])
    marks = loss.plan(batch(logp, [1.0, 2.0, 0.0], entropies=entropies), Alone(), config)
    assert marks.tolist() == pytest.approx([1.0, 0.8, 1.2]), "half of the largest omega, the largest, none"
    inputs = by_hand(logp, logp, [1.0, 2.0, 0.0], marks=marks)
    assert loss.function(inputs, config).loss.tolist() == pytest.approx([-1.0, -1.6, 0.0])
    assert loss.plan(batch(logp, [0.0] * 3), Alone(), config).tolist() == pytest.approx([1.0] * 3)


def doubled(inputs: LossInputs, config: AlgorithmConfig) -> PolicyLossTerms:
    """A loss from outside the package."""
    return PolicyLossTerms(-2 * inputs.advantages * inputs.logprobs, inputs.ratio, inputs.advantages > 9)


def test_a_loss_from_outside_needs_its_name_only() -> None:
    loss = find_policy_loss(f"{__name__}:doubled")
    inputs = random_inputs()
    torch.testing.assert_close(gradient(loss.function(inputs, algorithm()), inputs), -2 * inputs.advantages)
    assert loss.whole_sequences
    for name, message in (
        ("ppo", "expected one of clipped"),
        ("no_module:f", "no_module"),
        (f"{__name__}:gone", "gone"),
    ):
        with pytest.raises(ValueError, match=message):
            find_policy_loss(name)
