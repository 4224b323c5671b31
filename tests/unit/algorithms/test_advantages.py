"""Advantages by hand and by their invariances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_entropic.algorithms import advantages

METHODS = ("grpo", "grpo_no_std", "rloo", "reinforce_plus_plus_baseline")


def test_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(
        advantages("grpo_no_std", rewards), torch.tensor([[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]])
    )
    std = (1 / 3) ** 0.5
    torch.testing.assert_close(
        advantages("grpo", rewards),
        torch.tensor([[0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std], [1.5, -0.5, -0.5, -0.5]]),
        rtol=5e-6,
        atol=0,
    )
    torch.testing.assert_close(
        advantages("rloo", rewards), torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3], [2.0, -2 / 3, -2 / 3, -2 / 3]])
    )
    std = (4 / 7) ** 0.5  # squares of the centred rewards add up to 1 + 3; unbiased over 8
    torch.testing.assert_close(
        advantages("reinforce_plus_plus_baseline", rewards),
        torch.tensor([[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]]) / std,
        rtol=5e-6,
        atol=0,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("samples", [3, 7])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_give_exactly_zero(method: str, samples: int, value: float) -> None:
    """0.1 is no binary fraction: the mean of three of them minus one of them is not 0 in floating point."""
    rewards = torch.full((3, samples), value, dtype=torch.float64)
    rewards[1, 0] += 1
    result = advantages(method, rewards)
    assert bool((result[[0, 2]] == 0).all())
    assert bool((result[1] != 0).all())
    assert bool((advantages(method, torch.full_like(rewards, value)) == 0).all())


reward_tables = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(st.integers(-5, 5), min_size=n, max_size=n), min_size=1, max_size=6)
)


@pytest.mark.parametrize("method", METHODS)
@given(table=reward_tables, shift=st.integers(-3, 3), scale=st.sampled_from([0.5, 2.0, 8.0]))
@settings(max_examples=40, deadline=None)
def test_invariances(method: str, table: list[list[int]], shift: int, scale: float) -> None:
    """Groups sum to 0; adding a constant changes nothing; normalised methods ignore the scale, the others follow it."""
    rewards = torch.tensor(table, dtype=torch.float32)
    result = advantages(method, rewards)
    assert result.dtype == torch.float32
    assert result.sum(1).abs().max() < 1e-4
    torch.testing.assert_close(advantages(method, rewards + shift), result, rtol=1e-5, atol=1e-6)
    normalised = method in ("grpo", "reinforce_plus_plus_baseline")
    torch.testing.assert_close(
        advantages(method, rewards * scale), result * (1.0 if normalised else scale), rtol=1e-4, atol=1e-6
    )


@given(table=reward_tables)
@settings(max_examples=40, deadline=None)
def test_rloo_baseline_is_the_mean_of_the_others(table: list[list[int]]) -> None:
    rewards = torch.tensor(table, dtype=torch.float64)
    samples = rewards.shape[1]
    baseline = torch.stack([torch.cat([rewards[:, :i], rewards[:, i + 1 :]], 1).mean(1) for i in range(samples)], 1)
    torch.testing.assert_close(advantages("rloo", rewards).double(), rewards - baseline, rtol=1e-6, atol=1e-6)


def test_batch_whitening_gives_unit_deviation() -> None:
    result = advantages("reinforce_plus_plus_baseline", torch.rand(32, 8, generator=torch.Generator().manual_seed(0)))
    assert result.mean().abs() < 1e-6
    assert result.std().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (torch.zeros(4), "n_prompts, samples_per_prompt"),
        (torch.zeros(4, 1), "n_prompts, samples_per_prompt"),
        (torch.tensor([[0.0, float("nan")]]), "not finite"),
    ],
)
def test_bad_rewards_are_refused(rewards: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages("grpo", rewards)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown advantage"):
        advantages("gae", torch.zeros(2, 2))


def test_nsr_and_w_reinforce_look_at_the_sign_only() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.0, -1.0, 0.0]])
    assert advantages("nsr", rewards).tolist() == [[0, -1, 0], [-1, -1, -1]]
    assert advantages("w_reinforce", rewards).tolist() == [
        pytest.approx([0.1, -1, 0.1]),
        pytest.approx([-1, -1, -1]),
    ]


def test_wapo_trains_on_winners_only() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert advantages("wapo", rewards).tolist() == [[0.75, 0, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(advantages("wapo", rewards + 3), advantages("wapo", rewards))
    assert not advantages("wapo", torch.full((1, 3), 0.1, dtype=torch.float64)).any()
