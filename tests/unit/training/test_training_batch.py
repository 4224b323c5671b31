"""Between the rooms: trajectories become sequences, groups become metrics."""

from __future__ import annotations

import pickle

import pytest
import torch
from trajectories import reward_of, task_of, trajectory_of

from megatron_entropic.config.algorithm import DistillationConfig
from megatron_entropic.config.run import RolloutConfig
from megatron_entropic.training.rollouts import merged
from megatron_entropic.training.step import (
    entropy_profile,
    importance,
    mean_of,
    minibatches,
    mismatch,
    rollout_metrics,
    training_batch,
    with_teacher,
)
from megatron_entropic.types import Group, Scores, TrainingBatch


@pytest.fixture
def groups() -> list[Group]:
    def group(index: int, *rewards_and_lengths: tuple[float, int]) -> Group:
        task = task_of(index, [7, 8 + index])
        return Group(
            tuple(
                trajectory_of(task, i, range(n), logprobs=[-0.5] * n, finish_reason="length" if n == 4 else "stop")
                for i, (_, n) in enumerate(rewards_and_lengths)
            ),
            tuple(reward_of(reward) for reward, _ in rewards_and_lengths),
        )

    return [group(0, (1.0, 3), (0.0, 1)), group(1, (0.0, 2), (0.0, 4))]


@pytest.fixture
def batch(groups: list[Group]) -> TrainingBatch:
    return training_batch(groups, "grpo_no_std")


def test_a_sequence_is_prompt_and_response_with_one_advantage_for_every_token(batch: TrainingBatch) -> None:
    assert [sequence.tokens.tolist() for sequence in batch.sequences[:2]] == [[7, 8, 0, 1, 2], [7, 8, 0]]
    assert [sequence.prompt_length for sequence in batch.sequences] == [2] * 4
    advantages = [sequence.advantages.tolist() for sequence in batch.sequences]
    assert advantages == [[0.5] * 3, [-0.5], [0.0] * 2, [0.0] * 4]


def test_every_sequence_carries_the_success_of_its_whole_group(batch: TrainingBatch) -> None:
    assert [sequence.success for sequence in batch.sequences] == [0.5, 0.5, 0.0, 0.0]
    split = [[one.success for one in part[:1]] for part in minibatches(batch, 2, None)]
    assert split == [[0.5], [0.0]], "of the group, not of the part that is trained"
    travelled = pickle.loads(pickle.dumps(batch.sequences[0]))
    assert travelled.success == 0.5


def test_a_teacher_adds_to_the_advantage_of_each_token(batch: TrainingBatch) -> None:
    own = [torch.full((sequence.response_length,), -1.0) for sequence in batch.sequences]
    taught = [torch.linspace(-1.5, 0.0, sequence.response_length) for sequence in batch.sequences]
    scored = batch.scored(Scores(own, own))
    teacher = {"teacher_hf_dir": "somewhere", "coefficient": 2.0, "reward_weight": 0.5}
    mixed, metrics = with_teacher(scored, Scores(taught, taught), DistillationConfig(**teacher))
    found = [sequence.advantages.tolist() for sequence in mixed.sequences]
    assert found[0] == pytest.approx([0.25 - 1.0, 0.25 + 0.5, 0.25 + 2.0])
    assert found[1] == pytest.approx([-0.25 - 1.0])
    tokens = torch.cat(taught).double()
    assert metrics["distillation/kl"] == pytest.approx(float((-1.0 - tokens).mean()))
    assert metrics["distillation/teacher_logprob"] == pytest.approx(float(tokens.mean()))


def test_a_teacher_in_the_loss_leaves_rewards_their_weight(batch: TrainingBatch) -> None:
    own = [torch.full((sequence.response_length,), -1.0) for sequence in batch.sequences]
    teacher = {"teacher_hf_dir": "somewhere", "term": "loss", "reward_weight": 0.0}
    mixed, metrics = with_teacher(batch.scored(Scores(own, own)), None, DistillationConfig(**teacher))
    assert metrics == {}
    assert not any(sequence.advantages.any() for sequence in mixed.sequences)


def test_rounds_of_a_step_need_not_measure_the_same() -> None:
    """A judge that nobody had to ask in the first round: its counts are those of the second."""
    rounds = [
        (3, {"reward/x_mean": 1.0, "errors": 2.0}),
        (1, {"reward/x_mean": 0.0, "errors": 1.0, "judge/d_mean": 0.5}),
    ]
    assert merged(rounds) == {"reward/x_mean": 0.75, "errors": 3.0, "judge/d_mean": 0.5}


def test_mini_batches_are_whole_groups_in_order(batch: TrainingBatch) -> None:
    everything = list(batch.sequences)
    assert minibatches(batch, 1, None) == [everything]
    assert minibatches(batch, 2, None) == [everything[:2], everything[2:]]


def test_later_epochs_have_an_order_of_their_own_and_the_same_groups(batch: TrainingBatch) -> None:
    positions = {id(one): index for index, one in enumerate(batch.sequences)}

    def order(name: str | None) -> list[list[int]]:
        return [[positions[id(one)] for one in part] for part in minibatches(batch, 2, name)]

    names = [None, *(f"1/3/{epoch}" for epoch in range(1, 9))]
    orders = [order(name) for name in names]
    assert orders == [order(name) for name in names]
    assert orders[0] == [[0, 1], [2, 3]]
    assert all(sorted(parts) == [[0, 1], [2, 3]] for parts in orders)
    assert [[2, 3], [0, 1]] in orders


def test_entropy_profile(batch: TrainingBatch) -> None:
    entropies = [torch.tensor([0.3, 0.6, 0.9]), torch.tensor([0.2]), torch.tensor([0.4, 0.0]), torch.ones(4)]
    profile = entropy_profile(batch, Scores(entropies, entropies))
    assert profile == pytest.approx(
        {
            "entropy/rollout": 6.4 / 10,
            "entropy/correct": 0.6,
            "entropy/wrong": 4.6 / 7,
            "entropy/quarter_1": (0.3 + 0.2 + 0.4 + 1.0) / 4,
            "entropy/quarter_2": (0.6 + 0.0 + 1.0) / 3,
            "entropy/quarter_3": (0.9 + 1.0) / 2,
            "entropy/quarter_4": 1.0,
        }
    )


def test_importance_is_reported_before_truncation_and_only_where_it_is_used(batch: TrainingBatch) -> None:
    config = RolloutConfig()
    batch = batch.scored(Scores([torch.zeros(s.response_length) for s in batch.sequences], []))
    assert importance(batch, config) == {}
    config.importance_correction = "tis"
    metrics = importance(batch, config)
    assert metrics["importance/ratio_max"] == pytest.approx(1.6487, rel=1e-4)
    assert metrics["importance/cut_fraction"] == 0.0
    config.importance_level = "sequence"
    assert importance(batch, config)["importance/ratio_max"] == pytest.approx(7.389, rel=1e-3)
    assert importance(batch, config)["importance/cut_fraction"] > 0


def test_rollout_metrics(groups: list[Group]) -> None:
    metrics = rollout_metrics(groups)
    assert metrics["reward/mean"] == 0.25
    assert metrics["reward/solved_none"] == 0.5
    shares = [metrics[f"reward/solved_share_{fifth}"] for fifth in range(1, 6)]
    assert shares == [0.5, 0.0, 0.5, 0.0, 0.0], "one task of two never, the other half of the time"
    assert metrics["reward/solved_all"] == 0.0
    assert metrics["response/length_mean"] == 2.5
    assert metrics["response/length_max"] == 4
    assert metrics["response/truncated_fraction"] == 0.25


def test_mismatch_compares_score_pass_and_engine_over_all_tokens(batch: TrainingBatch) -> None:
    logprobs = [torch.full((sequence.response_length,), -0.5) for sequence in batch.sequences]
    logprobs[3][2] = -0.6
    metrics = mismatch(batch.scored(Scores(logprobs, logprobs)))
    assert metrics["mismatch/logprob_abs_max"] == pytest.approx(0.1, rel=1e-5)
    assert metrics["mismatch/logprob_abs_mean"] == pytest.approx(0.01, rel=1e-5)


def test_metrics_of_several_optimizer_steps_are_means_but_the_controller_is_where_it_is_now() -> None:
    updates = [{"loss/policy": 1.0, "entropy/alpha": -0.2}, {"loss/policy": 3.0, "entropy/alpha": -0.3}]
    assert mean_of(updates) == {"loss/policy": 2.0, "entropy/alpha": -0.3}
