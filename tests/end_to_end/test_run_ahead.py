"""Rollouts that run ahead, for real: two engines at work while the policy learns, replayed, and continued in flight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from training_run import ROOT, Run

from megatron_entropic.observability.records import RecordedStep, read_rollouts, recorded_steps, rollouts_path
from megatron_entropic.training.in_flight import in_flight_path, load_in_flight

LAG = 2
# Responses of an untrained model are long and of very different lengths, and engines have room for a few of them: they
# are the slower side, and something is in flight whenever weights come.
SETTINGS = (
    f"rollout.lag={LAG}",
    "rollout.engines=2",
    "warm_start.steps=0",
    "rollout.samples_per_prompt=8",
    "rollout.max_response_tokens=40",
    "rollout.max_concurrent_sequences=4",
    "rollout.max_resamples=1",
    "rollout.importance_correction=tis",
    "rollout.staleness_correction=tis",
    # An alpha of each prompt, by its success, under a guard that is at work: they are replayed and continued as well.
    "entropy_control.controller=unsolved",
    "entropy_control.guard=ceiling",
    "entropy_control.guards.top=0.98",
    "entropy_control.guards.gain=1",
    "optimizer.learning_rate=1e-3",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=5",
    "logging.rollouts_every_steps=1",
)


@pytest.fixture(scope="module")
def ahead(countdown_run: Callable[..., Run]) -> Run:
    """A run that loses an engine after four of its six steps."""
    run = countdown_run("ahead", *SETTINGS)
    process = run.start()
    try:
        deadline = time.monotonic() + 400
        while len(run.metrics()) < 4:
            assert process.poll() is None, run.log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, "step 4 was not reached"
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        engine = next(child for child in family if "EngineWorker" in " ".join(child.cmdline()))
        engine.kill()
        assert process.wait(timeout=400) == 0, run.log.read_text(encoding="utf-8")
    finally:
        process.kill()
    return run


def _steps(run: Path) -> dict[int, RecordedStep]:
    return {step: read_rollouts(rollouts_path(run, step)) for step in recorded_steps(run)}


def _replay(run: Run, output_dir: Path) -> str:
    command = [sys.executable, "-m", "megatron_entropic.cli", "replay", str(run.directory), "--schedule"]
    done = subprocess.run(
        [*command, "--output-dir", str(output_dir)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout


def test_no_token_is_older_than_the_lag_and_every_one_has_a_policy(ahead: Run) -> None:
    ages = []
    for step, recorded in _steps(ahead.directory).items():
        for response in recorded.responses:
            versions = [segment.weights_version for segment in response.trajectory.segments]
            assert versions == sorted(versions)
            ages += [step - 1 - version for version in versions]
    # How old within the limit is for the clock to say.
    assert 0 < max(ages) <= LAG
    assert min(ages) >= 0
    rows = ahead.metrics()
    # What an engine reported is what the policy computes with the weights of the same version, for each token.
    assert max(row["mismatch/logprob_abs_max"] for row in rows) < 1e-5
    assert max(row["staleness/logprob_abs_max"] for row in rows[1:]) > 0.01
    assert max(row["staleness/mixed_fraction"] for row in rows) > 0
    assert sum(row["cluster/engine_restarts"] for row in rows) == 1
    # Some prompts are not always solved, and the ceiling takes back a part of what their failures ask for.
    assert min(row["entropy/alpha_p10"] for row in rows) < 0
    assert min(row["entropy/band_action"] for row in rows) > 0
    assert (ahead.directory / "timeline.json").is_file()


def test_the_schedule_alone_was_decided_by_the_clock(ahead: Run, tmp_path: Path) -> None:
    told = _replay(ahead, tmp_path / "replayed")
    assert "6 steps" in told
    assert told.strip().endswith("0 differ"), told


def test_a_run_continues_with_what_was_in_flight(ahead: Run, tmp_path: Path) -> None:
    saved = load_in_flight(in_flight_path(ahead.directory, 3))
    assert any(one.segments and not one.finish_reason for one in saved), "responses were under way"
    directory = tmp_path / "run"
    shutil.copytree(ahead.directory, directory)
    shutil.rmtree(directory / "checkpoints/step_00000006")
    shutil.rmtree(directory / "rollouts")
    overrides = [f"run.output_dir={directory}", f"rollout.schedule_of={ahead.directory}"]
    continued = Run(directory, [*ahead.arguments, *overrides])
    continued.finish()
    assert "resuming after step 3" in continued.log.read_text(encoding="utf-8")
    varying = ("rollout/",)
    plain = [
        [{k: v for k, v in row.items() if not k.startswith(varying)} for row in run.reproducible_metrics()]
        for run in (ahead, continued)
    ]
    assert plain[1] == plain[0]
    before, after = _steps(ahead.directory), _steps(directory)
    for step in (4, 5, 6):
        for old, new in zip(before[step].responses, after[step].responses, strict=True):
            assert new.trajectory.continuation.tolist() == old.trajectory.continuation.tolist()
            assert new.trajectory.rollout_logprobs.tolist() == old.trajectory.rollout_logprobs.tolist()
