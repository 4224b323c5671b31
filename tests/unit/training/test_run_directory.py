"""What a run keeps of its steps, decided from configuration and metrics alone."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
import yaml
from trajectories import reward_of, task_of, trajectory_of

from megatron_entropic.checkpoints.run_checkpoints import MANIFEST, checkpoint_path
from megatron_entropic.cluster.cluster import Cluster
from megatron_entropic.config.load import dump_config
from megatron_entropic.config.run import Config
from megatron_entropic.errors import PeerDied, RunError
from megatron_entropic.observability.progress import Progress
from megatron_entropic.observability.records import recorded_steps, rollouts_path
from megatron_entropic.observability.settings_history import read_parts
from megatron_entropic.training.run_directory import RunDirectory
from megatron_entropic.types import Group, Scores, Sequence, TrainingBatch


def run_directory(folder: Path, **sections: dict[str, object]) -> RunDirectory:
    settings = {"run": {"output_dir": folder}, "model": {"hf_dir": folder}, "data": {"train_files": [folder / "x"]}}
    return RunDirectory(Config.model_validate(settings | sections))


SECTIONS = dict[str, dict[str, object]]
EVERY_STEP: dict[str, object] = {"rollouts_every_steps": 1}


def keep_steps(run: RunDirectory, *steps: int, skipped: tuple[int, ...] = ()) -> None:
    group = Group((trajectory_of(task_of(0), 0, [2], logprobs=[-0.5]),), (reward_of(1.0),))
    batch = TrainingBatch((group,), (Sequence(torch.tensor([1, 2]), 1, advantages=torch.zeros(1)),))
    scores = Scores([torch.zeros(1)], [torch.zeros(1)])
    with run.journal as journal:
        for step in steps:
            journal.keep(step, batch, scores, {"optimizer/skipped": float(step in skipped)})


@pytest.mark.parametrize(
    ("sections", "kept"),
    [
        ({}, [3, 20, 40]),
        ({"train": {"record_steps": [2, 5]}}, [2, 3, 5, 20, 40]),
        ({"logging": {"rollouts_every_steps": 4}}, [3, *range(4, 48, 4)]),
        ({"logging": {"rollouts_every_steps": 0}}, [3]),
        # The limits delete neither what was asked for nor what had a skipped update.
        (
            {"logging": {"rollouts_every_steps": 10, "rollouts_keep_last": 2}, "train": {"record_steps": [20]}},
            [3, 20, 30, 40],
        ),
        ({"logging": EVERY_STEP | {"rollouts_keep_last": None}}, list(range(1, 46))),
    ],
)
def test_rollouts_are_kept_every_so_often_where_asked_for_and_where_an_update_was_skipped(
    sections: SECTIONS, kept: list[int], tmp_path: Path
) -> None:
    keep_steps(run_directory(tmp_path, **sections), *range(1, 46), skipped=(3,))
    assert recorded_steps(tmp_path) == kept


def test_rollouts_take_no_more_megabytes_than_they_may(tmp_path: Path) -> None:
    logging = EVERY_STEP | {"rollouts_keep_last": None}
    keep_steps(run_directory(tmp_path, logging=logging), 1)
    size_mb = rollouts_path(tmp_path, 1).stat().st_size / 1e6
    keep_steps(run_directory(tmp_path, logging=logging | {"rollouts_keep_mb": 2.5 * size_mb}), 2, 3, 4, 5)
    assert recorded_steps(tmp_path) == [4, 5]
    keep_steps(run_directory(tmp_path, logging=logging | {"rollouts_keep_mb": 0.5 * size_mb}), 6)
    assert recorded_steps(tmp_path) == [6]


def test_rollouts_that_cannot_be_read_are_left_alone(tmp_path: Path) -> None:
    run = run_directory(tmp_path, logging=EVERY_STEP | {"rollouts_keep_last": 1})
    keep_steps(run, 1)
    rollouts_path(tmp_path, 1).write_bytes(b"PAR1 of another program")
    keep_steps(run, 2, 3)
    assert recorded_steps(tmp_path) == [1, 3]


def test_a_resume_forgets_the_rollouts_of_steps_that_are_computed_again(tmp_path: Path) -> None:
    run = run_directory(tmp_path, logging=EVERY_STEP, train={"record_steps": [4]})
    keep_steps(run, 1, 2, 3, 4, 5, skipped=(5,))
    run.journal._rollouts.truncate_after(2)
    assert recorded_steps(tmp_path) == [1, 2, 4, 5]


def test_fewer_steps_than_are_done_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    checkpoint = checkpoint_path(tmp_path / "checkpoints", 4)
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text("{}")
    run = run_directory(tmp_path, train={"steps": 3})
    with pytest.raises(ValueError, match=r"train\.steps=3, but this run has done 4 "), run:
        pass
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("older", [False, True], ids=["recorded", "of an older version"])
def test_a_resume_says_what_changed_and_keeps_what_was(
    tmp_path: Path, older: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of older versions have their settings in config.yaml alone, and lack those that are new."""
    (tmp_path / "x").write_text("rows")
    checkpoint = checkpoint_path(tmp_path / "checkpoints", 4)
    first = run_directory(tmp_path, optimizer={"learning_rate": 1e-3})
    first.journal.progress = Progress(9)
    if older:
        dump_config(first._config, tmp_path / "config.yaml")
        config = yaml.safe_load((tmp_path / "config.yaml").read_text())
        del config["logging"]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    else:
        first._record_settings(0)
    second = run_directory(tmp_path, optimizer={"learning_rate": 1e-4}, run={"output_dir": tmp_path, "seed": 7})
    second.journal.progress, second._newest = Progress(9), checkpoint
    second._keep_settings_before()
    second._record_settings(4)
    assert [(part.first_step, part.config["optimizer"]["learning_rate"]) for part in read_parts(tmp_path)] == [
        (1, 1e-3),
        (5, 1e-4),
    ]
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert said == [
        "warning: settings differ from step 5 on; both are in settings.jsonl:",
        "run.seed: 1 -> 7",
        "optimizer.learning_rate: 0.001 -> 0.0001",
    ]


def test_a_recorded_step_has_the_checkpoint_before_it(tmp_path: Path) -> None:
    train: dict[str, object] = {"steps": 9, "record_steps": [3, 6]}
    run = run_directory(tmp_path, train=train, checkpoint={"every_steps": 4})
    assert [step for step in range(1, 10) if run.checkpoints.due(step)] == [2, 4, 5, 8, 9]


class LostPolicy:
    """Its ranks are gone."""

    @property
    def policy(self) -> LostPolicy:
        return self

    def check_checkpoint(self, *, wait: bool) -> None:
        raise PeerDied("check_checkpoint: policy rank 0 was ended because its node ran out of memory")


def test_when_ranks_go_with_an_engine_both_losses_are_told(tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    run.journal.progress = Progress(60)
    told = "(?s)generate: the process of engine 0 died.*step 1 could not be saved: .*ran out of memory"
    with pytest.raises(PeerDied, match=told), run.checkpoints.preserving(cast(Cluster, LostPolicy()), 1):
        raise RunError("generate: the process of engine 0 died")


def test_a_restart_says_from_which_checkpoint_it_goes_on_or_that_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_directory(tmp_path)
    run.journal.progress = Progress(9)
    being_written = tmp_path / "checkpoints" / ".step_00000004.1.partial"
    being_written.mkdir(parents=True)
    run.journal.record_restart(1, 3, RunError("checkpoint: policy rank 0 died"))
    assert "restart 1 of 3 from the beginning: no checkpoint is complete yet" in capsys.readouterr().out
    checkpoint = checkpoint_path(tmp_path / "checkpoints", 4)
    checkpoint.mkdir()
    (checkpoint / MANIFEST).write_text("{}")
    run.journal.record_restart(2, 3, RunError("update: policy rank 0 died"))
    assert f"restart 2 of 3 from {checkpoint}" in capsys.readouterr().out
