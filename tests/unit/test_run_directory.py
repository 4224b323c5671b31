"""What a run keeps of its steps, decided from configuration and metrics alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_entropic.config import Config
from megatron_entropic.observability.rollouts import recorded_steps
from megatron_entropic.run_directory import RunDirectory
from megatron_entropic.types import Prompt, Sample, Scores, Sequence


def run_directory(folder: Path, **sections: dict[str, object]) -> RunDirectory:
    settings = {"run": {"output_dir": folder}, "model": {"hf_dir": folder}, "data": {"train_files": [folder / "x"]}}
    return RunDirectory(Config.model_validate(settings | sections))


@pytest.mark.parametrize(
    ("sections", "kept"),
    [
        ({}, [3]),
        ({"train": {"record_steps": [2, 5]}}, [2, 3, 5]),
        ({"logging": {"rollouts_every_steps": 4}}, [3, 4]),
    ],
)
def test_rollouts_are_kept_where_asked_for_and_where_an_update_was_skipped(
    sections: dict[str, dict[str, object]], kept: list[int], tmp_path: Path
) -> None:
    run = run_directory(tmp_path, **sections)
    sample = Sample(Prompt(0, [1], "", None), 0, [2], [-0.5], "stop", 0, reward=1.0, verifier_status="ok")
    sequence = Sequence(torch.tensor([1, 2]), 1, advantages=torch.zeros(1))
    scores = Scores([torch.zeros(1)], [torch.zeros(1)])
    for step in range(1, 6):
        run.keep_rollouts(step, [sample], [sequence], scores, {"optimizer/skipped": float(step == 3)})
    assert recorded_steps(tmp_path) == kept


def test_a_recorded_step_has_the_checkpoint_before_it(tmp_path: Path) -> None:
    train: dict[str, object] = {"steps": 9, "record_steps": [3, 6]}
    run = run_directory(tmp_path, train=train, checkpoint={"every_steps": 4})
    assert [step for step in range(1, 10) if run.checkpoint_due(step)] == [2, 4, 5, 8, 9]
