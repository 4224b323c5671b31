"""The simulation of rollouts that run ahead, against arithmetic."""

from __future__ import annotations

import pytest

from megatron_entropic.planning.ahead import Learning, ahead_time
from megatron_entropic.planning.decoding import EngineLoad, StepRates


def _load(lengths: list[int], *, at_once: int = 1000, pass_s: float = 0.01) -> EngineLoad:
    rates = StepRates(weights_s=pass_s, experts_s=0, expert_share=0, product_s=0, cache_s=0, fixed_s=0, sequence_s=0)
    return EngineLoad(lengths, 1.0, at_once, rates, prompt_tokens=10, prefill_token_s=0)


def test_without_a_lag_each_side_waits_for_the_other() -> None:
    found = ahead_time(_load([100] * 8), Learning(learn_s=2.0, publish_s=0.5), lag=0)
    assert found.step_s == pytest.approx(1.0 + 2.5)
    assert found.engines_busy == pytest.approx(1.0 / 3.5)
    assert found.policy_busy == pytest.approx(2.5 / 3.5)
    assert (found.mean_age, found.oldest) == (0, 0)


@pytest.mark.parametrize("generate_s", [1.0, 2.0, 4.0])
def test_a_lag_of_one_hides_the_shorter_side(generate_s: float) -> None:
    found = ahead_time(_load([100] * 8, at_once=8, pass_s=generate_s / 100), Learning(2.0, publish_s=0.0), lag=1)
    assert found.step_s == pytest.approx(max(generate_s, 2.0), rel=0.02)
    assert 0 < found.mean_age <= 1 == found.oldest


def test_a_longer_lag_fills_the_tail_of_long_responses() -> None:
    tailed = _load([1000, *[50] * 31], at_once=32)
    learning = Learning(learn_s=9.0, publish_s=0.0)
    steps = [ahead_time(tailed, learning, lag).step_s for lag in (0, 1, 2)]
    assert steps[0] == pytest.approx(10.0 + 9.0, rel=0.02)
    assert steps[0] > 1.5 * steps[1] >= steps[2]
    assert ahead_time(tailed, learning, 2).oldest <= 2


def test_with_shared_gpus_only_unfinished_responses_are_carried_over() -> None:
    tailed = _load([1000, *[50] * 31], at_once=32)
    apart, shared = (ahead_time(tailed, Learning(9.0, 0.0, colocated=one), 1) for one in (False, True))
    assert shared.step_s > apart.step_s
    assert shared.policy_busy + shared.engines_busy == pytest.approx(1.0)
    assert shared.step_s < ahead_time(tailed, Learning(9.0, 0.0, colocated=True), 0).step_s
