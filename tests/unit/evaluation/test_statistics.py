"""The estimators against their definitions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from megatron_entropic.evaluation.summary import (
    bootstrap_weights,
    interval,
    majority_is_correct,
    pass_at_k,
    sign_flip_p_value,
)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response() -> None:
    for responses in range(1, 8):
        for correct in range(responses + 1):
            outcomes = [True] * correct + [False] * (responses - correct)
            for k in range(1, responses + 1):
                subsets = list(combinations(outcomes, k))
                share = sum(any(subset) for subset in subsets) / len(subsets)
                assert pass_at_k(responses, correct, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_exact_for_many_responses() -> None:
    assert pass_at_k(1024, 1, 512) == pytest.approx(0.5, abs=1e-12)
    assert pass_at_k(1024, 513, 512) == 1.0


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_outside_its_range(k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(4, 2, k)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["1", "2", "2"], [True, False, False], False),
        (["1", "2", "1"], [True, False, True], True),
        (["1", "2"], [True, False], True),  # equally frequent: the first given
        ([None, None, "7"], [False, False, True], True),  # no answer, no vote
        ([None, None], [False, False], None),
    ],
)
def test_majority(answers: list[str | None], correct: list[bool], expected: bool | None) -> None:
    assert majority_is_correct(answers, correct) is expected


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).random(400)
    low, high = interval(bootstrap_weights(400, seed=1) @ values)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_sign_flips_agree_with_all_of_them() -> None:
    differences = np.array([0.5, 0.25, 0.25, -0.25, 0.5, 0.0, 0.75, 0.25])
    signs = (np.arange(256)[:, None] >> np.arange(8) & 1) * 2 - 1
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean()
    assert sign_flip_p_value(differences, seed=1) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p_value(np.zeros(5), seed=1) == 1.0
    assert sign_flip_p_value(np.ones(30), seed=1) < 0.001
