"""Token weights: the four modes by hand, and independence of micro-batches and ranks."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_entropic.algorithms import entropic_term, high_prob_token_weights, policy_loss, token_weights
from megatron_entropic.config.algorithm import Aggregation

MODES = get_args(Aggregation)
BUDGET = 16
CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}


def textbook(mode: str, losses: list[Tensor], masks: list[Tensor] | None = None) -> Tensor:
    """The loss of whole sequences at once, as the modes are defined; the mask picks the tokens that count."""
    masks = [torch.ones_like(loss, dtype=torch.bool) for loss in losses] if masks is None else masks
    kept = [loss[mask] for loss, mask in zip(losses, masks, strict=True)]
    if mode == "token-mean":
        flat = torch.cat(kept)
        return flat.sum() / max(flat.numel(), 1)
    sums = torch.stack([loss.sum() for loss in kept])
    if mode == "seq-mean-token-sum":
        return sums.mean()
    if mode == "seq-mean-token-mean":
        return (sums / torch.tensor([max(loss.numel(), 1) for loss in kept])).mean()
    return sums.mean() / BUDGET


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", [0.1, 0.1, 0.1, 0.1]),
        ("seq-mean-token-sum", [0.25, 0.25, 0.25, 0.25]),
        ("seq-mean-token-mean", [0.25, 0.25 / 3, 0.25 / 3, 0.25 / 3]),
        ("seq-mean-token-sum-norm", [0.25 / 16] * 4),
    ],
)
def test_by_hand(mode: Aggregation, expected: list[float]) -> None:
    """Two sequences of 1 and 3 tokens out of a step of 4 sequences and 10 tokens."""
    weights = token_weights(
        mode, torch.tensor([1, 3]), global_tokens=10, global_sequences=4, max_response_tokens=BUDGET
    )
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", [1 / 6, 0, 1 / 6, 1 / 6]),
        ("seq-mean-token-sum", [0.25, 0, 0.25, 0.25]),
        ("seq-mean-token-mean", [0.25, 0, 0.125, 0.125]),
        ("seq-mean-token-sum-norm", [0.25 / 16, 0, 0.25 / 16, 0.25 / 16]),
    ],
)
def test_high_probability_tokens_by_hand(mode: Aggregation, expected: list[float]) -> None:
    weights = high_prob_token_weights(
        mode,
        torch.tensor([True, False, True, True]),
        torch.tensor([1, 3]),
        global_high_prob_tokens=6,
        global_sequences=4,
        max_response_tokens=BUDGET,
    )
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(expected)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[list[int]], int]:
    """Lengths of a step's sequences (some empty), a split into micro-batches in any order, and a seed."""
    lengths = draw(st.lists(st.integers(0, BUDGET), min_size=1, max_size=9))
    order = draw(st.permutations(range(len(lengths))))
    parts = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    split = [[i for i, part in zip(order, parts, strict=True) if part == k] for k in range(4)]
    return lengths, split, draw(st.integers(0, 999))


@pytest.mark.parametrize("mode", MODES)
@given(step=steps())
@settings(max_examples=40, deadline=None)
def test_loss_and_gradient_do_not_depend_on_the_split(mode: Aggregation, step: tuple) -> None:
    """Base loss plus alpha times the EntroPIC term, both denominators, unequal lengths, empty responses included."""
    lengths, split, seed = step
    generator = torch.Generator().manual_seed(seed)
    old = [-0.1 * torch.rand(n, generator=generator) for n in lengths]
    advantages = [torch.randn(1, generator=generator).expand(n) for n in lengths]
    alpha = 0.7

    def terms(logprobs: list[Tensor], members: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        flat = [torch.cat([part[i] for i in members]) for part in (logprobs, old, advantages)]
        main = policy_loss(*flat, **CLIP)
        term, high = entropic_term(flat[0], main.ratio, flat[2], tau=0.95, **CLIP)
        return main.loss, term, high

    def leaves() -> list[Tensor]:
        source = torch.Generator().manual_seed(seed + 1)
        return [(part - 0.01 + 0.02 * torch.rand(len(part), generator=source)).requires_grad_() for part in old]

    everyone = list(range(len(lengths)))
    whole = leaves()
    loss, term, high = terms(whole, everyone)
    counts = {
        "global_tokens": sum(lengths),
        "global_sequences": len(lengths),
        "max_response_tokens": BUDGET,
    }
    high_counts = {**counts, "global_high_prob_tokens": int(high.sum())}
    del high_counts["global_tokens"]
    separate = [part.split(lengths) for part in (loss, term, high)]
    want_main = textbook(mode, separate[0])
    want_all = want_main + alpha * textbook(mode, separate[1])
    want_high = want_main + alpha * textbook(mode, separate[1], separate[2])
    for denominator, want in (("all_tokens", want_all), ("high_prob_tokens", want_high)):
        parts = leaves()
        total = torch.zeros(())
        for members in split:
            if sum(lengths[i] for i in members) == 0:
                continue
            member_lengths = torch.tensor([lengths[i] for i in members])
            loss_, term_, high_ = terms(parts, members)
            weights = token_weights(mode, member_lengths, **counts)
            adjust = (
                weights
                if denominator == "all_tokens"
                else high_prob_token_weights(mode, high_, member_lengths, **high_counts)
            )
            total = total + (weights * loss_).sum() + alpha * (adjust * term_).sum()
        torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-6)
        if total.requires_grad:
            got = torch.cat(torch.autograd.grad(total, parts, allow_unused=True, materialize_grads=True))
            expected = torch.cat(torch.autograd.grad(want, whole, retain_graph=True, materialize_grads=True))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_no_high_probability_token_gives_zero_weights(mode: Aggregation) -> None:
    weights = high_prob_token_weights(
        mode,
        torch.zeros(4, dtype=torch.bool),
        torch.tensor([3, 1]),
        global_high_prob_tokens=0,
        global_sequences=2,
        max_response_tokens=BUDGET,
    )
    assert weights.tolist() == [0, 0, 0, 0]


def test_denominators_differ_by_the_share_of_high_probability_tokens() -> None:
    """token-mean: the published denominator multiplies alpha by N / N_high."""
    high = torch.tensor([True, False, True, False, False])
    lengths = torch.tensor([2, 3])
    rest: dict[str, Any] = {"global_sequences": 2, "max_response_tokens": BUDGET}
    everything = token_weights("token-mean", lengths, global_tokens=5, **rest)
    published = high_prob_token_weights("token-mean", high, lengths, global_high_prob_tokens=2, **rest)
    torch.testing.assert_close(published[high], everything[high] * 5 / 2)


def test_bad_input_is_refused() -> None:
    lengths = torch.tensor([2])
    counts = {"global_tokens": 2, "global_sequences": 1, "max_response_tokens": BUDGET}
    with pytest.raises(ValueError, match="unknown aggregation"):
        token_weights("mean", lengths, **counts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="global_tokens"):
        token_weights("token-mean", lengths, **{**counts, "global_tokens": 0})
    with pytest.raises(ValueError, match="global_sequences"):
        token_weights("seq-mean-token-sum", lengths, **{**counts, "global_sequences": 0})
    with pytest.raises(ValueError, match="max_response_tokens"):
        token_weights("seq-mean-token-sum-norm", lengths, **{**counts, "max_response_tokens": 0})
    with pytest.raises(ValueError, match="2 response tokens but"):
        high_prob_token_weights(
            "token-mean",
            torch.ones(3, dtype=torch.bool),
            lengths,
            global_high_prob_tokens=3,
            global_sequences=1,
            max_response_tokens=BUDGET,
        )
