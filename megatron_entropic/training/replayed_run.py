"""A run with lag trained again under its recorded schedule, and compared with what it was.

On a CPU nothing else than the schedule depends on the clock, so tokens, log-probs and weights are those of the run, bit
for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_entropic.config.run import Config
from megatron_entropic.errors import UserError, reading
from megatron_entropic.observability.metrics import read_metrics
from megatron_entropic.observability.records import read_rollouts, recorded_steps, rollouts_path
from megatron_entropic.rollout.schedule import read_schedule

_OF_THE_CLOCK = ("time/", "throughput/", "memory/", "cluster/", "rollout/")
"""Metrics that two runs of the same tokens do not share."""


def replayed_config(run_dir: Path, output_dir: Path, steps: int | None) -> Config:
    """Configuration of a run that follows the schedule of `run_dir`.

    Args:
        run_dir: directory of a run with lag.
        output_dir: directory of the new run.
        steps: number of its last step; None: that of the run's last one.

    Raises:
        UserError: no such run, one without a schedule, or of an older version.
    """
    path = run_dir / "config.yaml"
    try:
        with reading(path):
            config = Config.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not the configuration of a run of this version: {error}") from error
    read_schedule(run_dir, 0)
    done = max((row["step"] for row in read_metrics(run_dir)), default=0)
    if not done:
        raise UserError(f"{run_dir}: no step was completed, so there is nothing to replay")
    settings = config.model_dump()
    settings["run"] |= {"name": f"{config.run.name}, replayed", "output_dir": output_dir, "resume": "auto"}
    settings["rollout"]["schedule_of"] = run_dir.absolute()
    settings["train"]["steps"] = min(done, steps or done)
    return Config.model_validate(settings)


def compare_runs(first: Path, second: Path) -> tuple[list[str], int, int]:
    """Compare the steps that two runs share: metrics, and tokens and log-probs where rollouts were kept.

    Returns:
        A line for each value that differs; number of steps; number of values compared.
    """
    metrics = [{row["step"]: row for row in read_metrics(run)} for run in (first, second)]
    shared = sorted(metrics[0].keys() & metrics[1].keys())
    differences, values = [], 0
    for step in shared:
        before, now = metrics[0][step], metrics[1][step]
        names = [name for name in before if not name.startswith(_OF_THE_CLOCK)]
        values += len(names)
        differences += [f"step {step}: {n}: {before[n]} and {now.get(n)}" for n in names if before[n] != now.get(n)]
    for step in sorted({*recorded_steps(first)} & {*recorded_steps(second)} & {*shared}):
        rows = [list(map(_values, read_rollouts(rollouts_path(run, step)).responses)) for run in (first, second)]
        values += sum(len(column) for row in rows[0] for column in row)
        differences += [
            f"step {step}: response {number}" for number, (a, b) in enumerate(zip(*rows, strict=True)) if a != b
        ]
    return differences, len(shared), values


def _values(response: Any) -> tuple[list[Any], ...]:
    one = response.trajectory
    segments = [value for s in one.segments for value in (s.weights_version, s.tokens.size)]
    return one.continuation.tolist(), one.rollout_logprobs.tolist(), response.old_logprobs.tolist(), segments
