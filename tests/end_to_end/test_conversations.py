"""Conversations for real: a tool that never says the same twice, engines that run ahead, a replay all the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from training_run import Run

from megatron_entropic.environments.record import CONVERSATIONS_FOLDER
from megatron_entropic.observability.records import RecordedStep, read_rollouts, recorded_steps, rollouts_path
from megatron_entropic.training.in_flight import in_flight_path, load_in_flight
from megatron_entropic.types import Origin

SETTINGS = (
    "environment=tests.end_to_end.moody_tool:MoodyTool",
    "environment.max_turn_tokens=12",
    "rollout.lag=1",
    "rollout.engines=1",
    "rollout.samples_per_prompt=4",
    "rollout.max_response_tokens=40",
    "rollout.max_concurrent_sequences=8",
    "rollout.importance_correction=tis",
    "rollout.staleness_correction=tis",
    "warm_start.steps=0",
    "optimizer.learning_rate=1e-3",
    "train.steps=4",
    "checkpoint.keep_last=5",
    "logging.rollouts_every_steps=1",
)


@pytest.fixture(scope="module")
def talk(countdown_run: Callable[..., Run]) -> Run:
    """A run of four steps with checkpoints after two and four."""
    run = countdown_run("talk", *SETTINGS)
    run.finish()
    return run


def _steps(run: Path) -> dict[int, RecordedStep]:
    return {step: read_rollouts(rollouts_path(run, step)) for step in recorded_steps(run)}


def test_what_the_tool_said_is_read_and_not_learned(talk: Run) -> None:
    responses = [response for step in _steps(talk.directory).values() for response in step.responses]
    assert len(responses) == 4 * 8 * 4
    turns = []
    for response in responses:
        trajectory = response.trajectory
        said = [segment for segment in trajectory.segments if segment.origin is Origin.ENVIRONMENT]
        assert all(segment.tokens.size == 2 for segment in said)
        assert response.old_logprobs.size == response.advantages.size == trajectory.response_length
        turns.append(int(trajectory.turn_numbers[-1]))
        assert (turns[-1] == 3) == (trajectory.ending == "over")
    assert max(turns) == 3
    rows = talk.metrics()
    # The engine's log-prob of every token, over all turns, is what the policy computes for the masked sequence.
    assert max(row["mismatch/logprob_abs_max"] for row in rows) < 1e-5
    assert all(row["environment/turns_max"] == 3 for row in rows)
    assert all({"entropy/turn_1", "entropy/turn_3", "authority/turn_2"} <= row.keys() for row in rows)
    assert all(row["reward/verifier_errors"] == 0 for row in rows)


def test_a_run_continues_in_the_middle_of_conversations(talk: Run, tmp_path: Path) -> None:
    saved = load_in_flight(in_flight_path(talk.directory, 2))
    in_the_middle = [one for one in saved if one.segments and not one.ending]
    assert any(segment.origin is Origin.ENVIRONMENT for one in in_the_middle for segment in one.segments)
    directory = tmp_path / "run"
    shutil.copytree(talk.directory, directory)
    shutil.rmtree(directory / "checkpoints/step_00000004")
    shutil.rmtree(directory / "rollouts")
    shutil.rmtree(directory / CONVERSATIONS_FOLDER)
    overrides = [f"run.output_dir={directory}", f"rollout.schedule_of={talk.directory}"]
    continued = Run(directory, [*talk.arguments, *overrides])
    continued.finish()
    assert "resuming after step 2" in continued.log.read_text(encoding="utf-8")
    plain = [
        [{k: v for k, v in row.items() if not k.startswith("rollout/")} for row in run.reproducible_metrics()]
        for run in (talk, continued)
    ]
    assert plain[1] == plain[0]
    before, after = _steps(talk.directory), _steps(directory)
    for step in (3, 4):
        for old, new in zip(before[step].responses, after[step].responses, strict=True):
            np.testing.assert_array_equal(new.trajectory.continuation, old.trajectory.continuation)
            np.testing.assert_array_equal(new.trajectory.rollout_logprobs, old.trajectory.rollout_logprobs)
            assert new.trajectory.ending == old.trajectory.ending
