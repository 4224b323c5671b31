"""The entropy that drives alpha when older weights sampled: an estimate for the states of the current policy."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_entropic.policy.step.control import measured_entropy
from megatron_entropic.types import Scores, Sequence


def _sequence(rollout: list[float], sampling: list[float] | None) -> Sequence:
    return Sequence(
        tokens=torch.arange(len(rollout) + 1),
        prompt_length=1,
        rollout_logprobs=torch.tensor(rollout),
        sampling_logprobs=None if sampling is None else torch.tensor(sampling),
    )


def test_tokens_of_the_current_weights_count_alike() -> None:
    scores = Scores([torch.tensor([-0.5, -0.1])], [torch.tensor([0.4, 0.2])])
    total = measured_entropy([_sequence([-0.5, -0.1], None)], scores, "score_pass", 2.0)
    assert total.tolist() == pytest.approx([0.6, 2.0])
    nothing_old = measured_entropy([_sequence([-0.5, -0.1], [math.nan, math.nan])], scores, "score_pass", 2.0)
    assert nothing_old.tolist() == pytest.approx([0.6, 2.0])


def test_a_token_counts_by_how_often_the_current_policy_comes_to_its_state() -> None:
    # The first token is 1.5 times as probable now as it was, the second 4 times: beyond the cap of 2 together.
    now = torch.tensor([math.log(0.3), math.log(0.4), math.log(0.5)])
    old = [math.log(0.2), math.log(0.1), math.nan]
    scores = Scores([now], [torch.tensor([1.0, 2.0, 3.0])])
    total = measured_entropy([_sequence([-1.0] * 3, old)], scores, "score_pass", 2.0)
    assert total.tolist() == pytest.approx([1.0 + 1.5 * 2.0 + 2.0 * 3.0, 1.0 + 1.5 + 2.0])


def test_the_weighted_mean_is_that_of_the_current_policy() -> None:
    # Two tokens over two states: a first token a or b, then a state whose entropy depends on it. Exact expectations.
    old, new, entropies = {"a": 0.7, "b": 0.3}, {"a": 0.5, "b": 0.5}, {"a": 0.2, "b": 0.6}
    sequences, columns, values = [], [], []
    for name, count in (("a", 700), ("b", 300)):
        for _ in range(count):
            sequences.append(_sequence([-1.0, -1.0], [math.log(old[name]), -1.0]))
            columns.append(torch.tensor([math.log(new[name]), -1.0]))
            values.append(torch.tensor([0.0, entropies[name]]))
    total = measured_entropy(sequences, Scores(columns, values), "score_pass", 2.0)
    # First states have entropy 0 and weight 1; the mean over second states is what the new policy would meet.
    assert float(total[0]) / 1000 == pytest.approx(0.5 * 0.2 + 0.5 * 0.6, rel=1e-5)


def test_feedback_of_sampling_is_minus_the_mean_log_prob_as_reported() -> None:
    scores = Scores([torch.tensor([-0.5, -0.1])], [torch.tensor([0.4, 0.2])])
    total = measured_entropy([_sequence([-0.7, -0.3], [-0.6, -0.2])], scores, "sampling", 2.0)
    assert total.tolist() == pytest.approx([1.0, 2.0])
