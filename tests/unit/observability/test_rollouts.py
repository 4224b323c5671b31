"""A step's rollouts come back from disk as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from trajectories import task_of, trajectory_of

from megatron_entropic.errors import UserError
from megatron_entropic.files.formats import FileFormat
from megatron_entropic.observability import records
from megatron_entropic.observability.records import (
    read_rollouts,
    recorded_lengths,
    recorded_steps,
    rollouts_path,
    write_rollouts,
)
from megatron_entropic.training.step import training_batch
from megatron_entropic.types import Group, Reward, Scores, Segment, Sequence, TrainingBatch, Trajectory


def step_of(*lengths: int, reference: bool) -> tuple[TrainingBatch, Scores]:
    draw = torch.Generator().manual_seed(1)
    task = task_of(7, [1, 2], "What?", {"target": 3}, data_source="file", extra_info={"level": "hard"})
    trajectories, sequences, logprobs, entropies = [], [], [], []
    for number, length in enumerate(lengths):
        values = [-torch.rand(length, generator=draw) for _ in range(3)]
        tokens = range(length)
        trajectories.append(trajectory_of(task, number, tokens, "a\ud800b", logprobs=values[0].tolist(), version=4))
        if not length:
            continue  # its environment failed before the policy's first word
        sequences.append(
            Sequence(
                torch.tensor([1, 2, *tokens]),
                2,
                advantages=torch.full((length,), 0.25),
                reference_logprobs=values[2] if reference else None,
            )
        )
        logprobs.append(values[1])
        entropies.append(-values[1])
    group = Group(tuple(trajectories), (Reward(0.5, 0.25, "ok"),) * len(lengths))
    return TrainingBatch((group,), tuple(sequences)), Scores(logprobs, entropies)


@pytest.mark.parametrize("reference", [True, False])
def test_everything_comes_back(reference: bool, tmp_path: Path) -> None:
    batch, scores = step_of(3, 0, 5, reference=reference)
    path = rollouts_path(tmp_path, 12)
    write_rollouts(path, 12, batch, scores, {"entropy/alpha": -0.25})
    attempts = batch.groups[0].trajectories
    assert recorded_lengths(path) == (
        [len(one.task.tokens) for one in attempts],
        [one.response_length for one in attempts],
    )
    read = read_rollouts(path)
    assert recorded_steps(tmp_path) == [12]
    assert (read.step, read.metrics) == (12, {"entropy/alpha": -0.25})
    (group,) = read.groups()
    assert group.rewards == batch.groups[0].rewards
    assert [one.response_length for one in group.trajectories] == [3, 0, 5]
    for index, response in enumerate(read.trained):
        found, written, sequence = response.trajectory, batch.trajectories[index], batch.sequences[index]
        assert found.task.tokens.tolist() == written.task.tokens.tolist()
        for name in ("index", "text", "ground_truth", "data_source", "extra_info"):
            assert getattr(found.task, name) == getattr(written.task, name), name
        assert found.text == "a\\ud800b"
        for name in ("sample_index", "finish_reason", "weights_version"):
            assert getattr(found, name) == getattr(written, name), name
        np.testing.assert_array_equal(found.continuation, written.continuation)
        np.testing.assert_array_equal(found.rollout_logprobs, written.rollout_logprobs)
        np.testing.assert_array_equal(response.old_logprobs, scores.logprobs[index].numpy())
        np.testing.assert_array_equal(response.entropies, scores.entropies[index].numpy())
        np.testing.assert_array_equal(response.advantages, sequence.advantages.numpy())
        if reference:
            np.testing.assert_array_equal(response.reference_logprobs, sequence.reference_logprobs.numpy())
        else:
            assert response.reference_logprobs is None


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert recorded_steps(tmp_path) == []
    with pytest.raises(ValueError, match="not the recorded rollouts"):
        read_rollouts(tmp_path / "missing.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not the recorded rollouts"):
        read_rollouts(tmp_path / "x.parquet")


def test_files_of_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of before there were versions are read; a newer one is called what it is, and is not deleted."""
    batch, scores = step_of(3, reference=False)
    path = rollouts_path(tmp_path, 12)
    monkeypatch.setattr(FileFormat, "stamp", lambda self, content: content)
    write_rollouts(path, 12, batch, scores, {})
    assert read_rollouts(path).step == 12
    monkeypatch.setattr(FileFormat, "stamp", lambda self, content: {"format_version": 2, **content})
    write_rollouts(path, 12, batch, scores, {})
    with pytest.raises(UserError, match=r"step_000012\.parquet: written by a newer .* \(rollouts format 2"):
        read_rollouts(path)


def test_contexts_of_an_attempt_come_back_as_one(tmp_path: Path) -> None:
    task = task_of(7, [1, 2])

    def policy(*tokens: int) -> Segment:
        return Segment(np.array(tokens, np.int32), -np.array(tokens, np.float32), 3)

    said = [policy(4, 5), Segment.of_environment(np.array([6], np.int32)), policy(7)]
    summary = Segment.of_context(np.array([8, 9], np.int32))
    plain = Trajectory(task, 0, (), "stop", "text", ending="over")
    attempts = (plain.with_segments([*said, summary, policy(3)]), replace(plain, sample_index=1, segments=(policy(2),)))
    batch = training_batch([Group(attempts, (Reward(1.0, 1.0, "ok"), Reward(0.0, 0.0, "ok")))], "grpo_no_std")
    assert [one.tokens.tolist() for one in batch.sequences] == [[1, 2, 4, 5, 6, 7], [8, 9, 3], [1, 2, 2]]
    values = [torch.zeros(one.response_length) for one in batch.sequences]
    write_rollouts(rollouts_path(tmp_path, 1), 1, batch, Scores(values, values), {})
    read = read_rollouts(rollouts_path(tmp_path, 1))
    again = training_batch(read.groups(), "grpo_no_std")
    for before, now in zip(batch.sequences, again.sequences, strict=True):
        assert now.tokens.tolist() == before.tokens.tolist()
        assert (now.mask is None) == (before.mask is None)
        assert now.advantages is not None
        assert before.advantages is not None
        assert now.advantages.tolist() == before.advantages.tolist()
    assert [len(one.earlier) for one in read.groups()[0].trajectories] == [1, 0]
    assert [reward.value for reward in again.rewards] == [1.0, 1.0, 0.0]


def test_a_long_rollout_is_written_in_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of more than 2 GB does not fit into one column of strings, nor a copy of all tokens into memory."""
    batch, scores = step_of(5, 3, reference=True)
    write_rollouts(rollouts_path(tmp_path, 1), 1, batch, scores, {})
    monkeypatch.setattr(records, "_ROW_GROUP_TOKENS", 4)
    write_rollouts(rollouts_path(tmp_path, 2), 2, batch, scores, {})
    whole, parted = (pyarrow.parquet.ParquetFile(rollouts_path(tmp_path, step)) for step in (1, 2))
    assert (whole.num_row_groups, parted.num_row_groups) == (1, 2)
    assert parted.read().equals(whole.read())
