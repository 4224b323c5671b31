"""Between the rooms: samples become sequences, groups become metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_entropic.cluster.engine_group import sample_seed
from megatron_entropic.config.run import Config
from megatron_entropic.training.step import (
    attach_scores,
    entropy_profile,
    importance,
    mean_of,
    minibatches,
    mismatch,
    rollout_metrics,
    training_batch,
)
from megatron_entropic.types import Prompt, Sample, Scores


def _config(**algorithm: object) -> Config:
    return Config.model_validate(
        {
            "model": {"hf_dir": Path("model")},
            "data": {"train_files": [Path("train.parquet")]},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2},
            "algorithm": algorithm,
        }
    )


@pytest.fixture
def samples() -> list[Sample]:
    rewards_and_lengths = [(1.0, 3), (0.0, 1), (0.0, 2), (0.0, 4)]
    return [
        Sample(
            prompt=Prompt(index=i // 2, tokens=[7, 8 + i // 2], text="", ground_truth=None),
            sample_index=i % 2,
            response_tokens=list(range(length)),
            rollout_logprobs=[-0.5] * length,
            finish_reason="length" if i == 3 else "stop",
            weights_version=0,
            reward=reward,
            verifier_reward=reward,
        )
        for i, (reward, length) in enumerate(rewards_and_lengths)
    ]


def test_a_sequence_is_prompt_and_response_with_one_advantage_for_every_token(samples: list[Sample]) -> None:
    batch = training_batch(samples, _config(advantage="grpo_no_std"))
    assert [sequence.tokens.tolist() for sequence in batch[:2]] == [[7, 8, 0, 1, 2], [7, 8, 0]]
    assert [sequence.prompt_length for sequence in batch] == [2] * 4
    assert [sequence.advantages.tolist() for sequence in batch] == [[0.5] * 3, [-0.5], [0.0] * 2, [0.0] * 4]


def test_mini_batches_are_whole_groups_in_order(samples: list[Sample]) -> None:
    config = _config()
    batch = training_batch(samples, config)
    assert minibatches(batch, config, step=1, epoch=0) == [batch]
    config.algorithm.optimizer_steps_per_rollout = 2
    assert minibatches(batch, config, step=1, epoch=0) == [batch[:2], batch[2:]]


def test_later_epochs_have_an_order_of_their_own_and_the_same_groups(samples: list[Sample]) -> None:
    config = _config(optimizer_steps_per_rollout=2, epochs_per_rollout=9)
    batch = training_batch(samples, config)

    def order(epoch: int) -> list[list[int]]:
        positions = {id(one): index for index, one in enumerate(batch)}
        return [[positions[id(one)] for one in part] for part in minibatches(batch, config, step=3, epoch=epoch)]

    orders = [order(epoch) for epoch in range(9)]
    assert orders == [order(epoch) for epoch in range(9)]
    assert orders[0] == [[0, 1], [2, 3]]
    assert all(sorted(parts) == [[0, 1], [2, 3]] for parts in orders)
    assert [[2, 3], [0, 1]] in orders


def test_entropy_profile(samples: list[Sample]) -> None:
    entropies = [torch.tensor([0.3, 0.6, 0.9]), torch.tensor([0.2]), torch.tensor([0.4, 0.0]), torch.ones(4)]
    profile = entropy_profile(samples, Scores(entropies, entropies))
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


def test_importance_is_reported_before_truncation_and_only_where_it_is_used(samples: list[Sample]) -> None:
    config = _config()
    batch = training_batch(samples, config)
    attach_scores(batch, Scores([torch.zeros(s.response_length) for s in batch], []))
    assert importance(batch, config) == {}
    config.rollout.importance_correction = "tis"
    metrics = importance(batch, config)
    assert metrics["importance/ratio_max"] == pytest.approx(1.6487, rel=1e-4)
    assert metrics["importance/cut_fraction"] == 0.0
    config.rollout.importance_level = "sequence"
    assert importance(batch, config)["importance/ratio_max"] == pytest.approx(7.389, rel=1e-3)
    assert importance(batch, config)["importance/cut_fraction"] > 0


def test_rollout_metrics(samples: list[Sample]) -> None:
    metrics = rollout_metrics(samples, _config())
    assert metrics["reward/mean"] == 0.25
    assert metrics["reward/solved_none"] == 0.5
    assert metrics["reward/solved_all"] == 0.0
    assert metrics["response/length_mean"] == 2.5
    assert metrics["response/length_max"] == 4
    assert metrics["response/truncated_fraction"] == 0.25


def test_mismatch_compares_score_pass_and_engine_over_all_tokens(samples: list[Sample]) -> None:
    batch = training_batch(samples, _config())
    logprobs = [torch.full((sequence.response_length,), -0.5) for sequence in batch]
    logprobs[3][2] = -0.6
    attach_scores(batch, Scores(logprobs, logprobs))
    metrics = mismatch(batch)
    assert metrics["mismatch/logprob_abs_max"] == pytest.approx(0.1, rel=1e-5)
    assert metrics["mismatch/logprob_abs_mean"] == pytest.approx(0.01, rel=1e-5)


def test_metrics_of_several_optimizer_steps_are_means_but_the_controller_is_where_it_is_now() -> None:
    updates = [{"loss/policy": 1.0, "entropy/alpha": -0.2}, {"loss/policy": 3.0, "entropy/alpha": -0.3}]
    assert mean_of(updates) == {"loss/policy": 2.0, "entropy/alpha": -0.3}


def test_every_response_has_a_seed_of_its_own() -> None:
    seeds = [sample_seed(1, step, prompt, sample) for step in range(20) for prompt in range(20) for sample in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(1, 2, 3, 4) == sample_seed(1, 2, 3, 4) != sample_seed(2, 2, 3, 4)
