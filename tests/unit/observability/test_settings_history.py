"""A run that is resumed under other settings: what has changed, what is kept, and which steps belong to what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_entropic.observability.settings_history import (
    Change,
    RunPart,
    parts_of_steps,
    read_parts,
    record_part,
    sampled_digest,
)
from megatron_entropic.reports.advice import verdicts
from megatron_entropic.reports.report import write_report
from megatron_entropic.reports.run import Run, load_run, summarise


def settings(**changed: Any) -> dict[str, Any]:
    control = {"controller": "pi", "target": changed.pop("target", 0.5), "tau": 0.95}
    return {
        "run": {"name": "resumed", "output_dir": "/somewhere"},
        "optimizer": {"learning_rate": changed.pop("rate", 1e-3)},
        "entropy_control": control,
        "train": {"steps": changed.pop("steps", 40)},
    }


def resumed_run(directory: Path) -> Run:
    """Steps 1 to 20 at a target of 0.5, 21 to 30 at 0.2, and longer from 31 on."""
    for first, config in (
        (1, settings()),
        (21, settings(target=0.2, rate=1e-4)),
        (31, settings(target=0.2, rate=1e-4, steps=60)),
    ):
        record_part(directory, RunPart(first, config), read_parts(directory))
    rows = [
        {
            "step": step,
            "entropy/mean": 0.5 if step <= 20 else 0.2,
            "entropy/target": 0.5 if step <= 20 else 0.2,
            "entropy/alpha": -1.0 if step <= 20 else 0.1,
            "reward/mean": 0.0 if step <= 20 else 1.0,
        }
        for step in range(1, 41)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_run(directory)


def test_changed_settings_are_named_and_both_kept(tmp_path: Path) -> None:
    assert record_part(tmp_path, RunPart(1, settings()), []) == []
    changed = record_part(tmp_path, RunPart(3, settings(rate=1e-4, target=0.2)), read_parts(tmp_path))
    assert [str(change) for change in changed] == [
        "optimizer.learning_rate: 0.001 -> 0.0001",
        "entropy_control.target: 0.5 -> 0.2",
    ]
    assert [(part.first_step, part.config["optimizer"]["learning_rate"]) for part in read_parts(tmp_path)] == [
        (1, 1e-3),
        (3, 1e-4),
    ]


def test_the_same_settings_begin_no_part_and_steps_computed_again_forget_theirs(tmp_path: Path) -> None:
    record_part(tmp_path, RunPart(1, settings()), [])
    record_part(tmp_path, RunPart(5, settings(rate=2e-3)), read_parts(tmp_path))
    assert record_part(tmp_path, RunPart(9, settings(rate=2e-3)), read_parts(tmp_path)) == []
    assert [part.first_step for part in read_parts(tmp_path)] == [1, 5]
    assert record_part(tmp_path, RunPart(5, settings()), read_parts(tmp_path)) == []
    assert [part.first_step for part in read_parts(tmp_path)] == [1]
    record_part(tmp_path, RunPart(1, settings(rate=3e-3)), read_parts(tmp_path))
    assert [part.config["optimizer"]["learning_rate"] for part in read_parts(tmp_path)] == [3e-3]


def test_files_that_changed_under_their_name_are_a_change(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    file.write_bytes(b"one")
    before = RunPart(1, settings(), contents={"data.train_files": sampled_digest([file])})
    record_part(tmp_path, before, [])
    file.write_bytes(b"two")
    after = RunPart(2, settings(), contents={"data.train_files": sampled_digest([file])})
    (change,) = record_part(tmp_path, after, read_parts(tmp_path))
    assert str(change) == "data.train_files: the files as they were -> other contents"


def test_a_part_that_only_goes_on_for_longer_counts_to_the_one_before() -> None:
    parts = [RunPart(1, settings()), RunPart(5, settings(steps=99)), RunPart(9, settings(steps=99, target=0.1))]
    assert [part.first_step for part in parts_of_steps(parts)] == [1, 9]


def test_another_number_of_threads_rounds_the_steps_that_follow() -> None:
    assert Change("cluster.cpu_threads", "1", "2").acts_on_steps
    assert not Change("cluster.max_restarts", "1", "2").acts_on_steps


@pytest.mark.parametrize("line", ["[]", "{}", '{"first_step": "1", "config": {}}', '{"first_step": 1, "config": 3}'])
def test_a_damaged_record_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "settings.jsonl").write_text(f'{line}\n{{"first_step": 1, "config": {{}}}}\n')
    with pytest.raises(ValueError, match=r"settings\.jsonl, line 1: expected a"):
        read_parts(tmp_path)


def test_each_part_is_shown_under_its_own_settings(tmp_path: Path) -> None:
    run = resumed_run(tmp_path)
    assert [(stretch.steps[0], stretch.steps[-1], stretch.target) for stretch in run.stretches] == [
        (1, 20, 0.5),
        (21, 40, 0.2),
    ]
    summary = summarise(run)
    assert (summary.target, summary.tracking_error, summary.saturated) == (0.2, 0.0, 0.0)
    assert summary.reward_start == 0.0
    assert [verdict.tone for verdict in verdicts(run)] == ["good"]
    assert run.at(20).number("entropy_control.target", 0.0) == 0.5
    page = write_report([tmp_path], tmp_path / "out").read_text(encoding="utf-8")
    assert "settings changed at step 21" in page
    assert "<code>optimizer.learning_rate</code></td><td><code>0.001</code></td><td><code>0.0001</code>" in page
    assert "every value from step 21 to 30" in page
    assert "every value from step 31 on" in page
