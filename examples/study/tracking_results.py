"""What the runs of a study of control said: one table, and the numbers of a leg or a run that the page shows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow
from cases import CaseRun
from rows import Results, grouped, series

from megatron_entropic.algorithms.entropy_control.tuning import Plant, identify_plant, settled_after
from megatron_entropic.files.atomic import write_parquet
from megatron_entropic.reports.run import load_run

TUNED = "tuned-leg{leg}.json"
"""What `tune` proposed for a leg, in the run's directory."""
BAND = 0.05
"""Half the width of the band around the target, as a share of it."""
SMOOTHING_STEPS = 10
"""A run has settled when means of so many steps stay in the band: single measurements are too noisy for it."""
LAST_STEPS = 20
"""Steps whose mean is the final reward."""
_METRICS = (
    "reward/mean",
    "entropy/rollout",
    "entropy/mean",
    "entropy/target",
    "entropy/alpha",
    "entropy/proportional",
    "entropy/integral_term",
    "entropy/high_prob_fraction",
    "entropy/actuated_fraction",
    "time/step_s",
)
_WORDS = ("table", "groups", "case", "task", "regime", "setting", "tuned")
_NUMBERS = ("seed", "updates", "leg", "step")
"""leg is 0 for steps of the run that it goes on from; tuned is JSON or None."""


@dataclass(frozen=True)
class RunKey:
    """Which run."""

    table: str
    groups: str
    """Of a run about sensitivity: the tables it is in, joined by commas."""
    case: str
    task: str
    regime: str
    seed: int
    updates: int
    """Optimizer steps of a rollout."""


@dataclass(frozen=True)
class Tracking:
    """How well entropy kept to its target over some steps; entropies in nats."""

    target: float
    entropy: float
    """Mean."""
    offset: float
    """|mean H - target| as a share of the target."""
    error: float
    """Mean |H - target|."""
    inside: float
    """Share of steps within the band."""
    alpha: float
    """Mean."""
    saturated: float
    """Share of steps with |alpha| = 1."""
    reward: float
    """Mean of the last steps."""


@dataclass(frozen=True)
class Recovery:
    """What followed a change."""

    largest_error: float
    """Of means of SMOOTHING_STEPS steps after the change, as a share of the target."""
    settled_after: int | None
    """Steps until such means stay in the band; None: they do not."""
    overshoot: float
    """How far such means went beyond the target to the other side than the first error, as a share of the target."""
    wound_up: int
    """Steps with alpha at the limit that the error had already left: where an integral is wound up."""
    saturated: float


def read_results(runs: Iterable[tuple[CaseRun, Path]]) -> Results:
    """The rows of finished runs."""
    found: Results = []
    for run, directory in runs:
        loaded = load_run(directory)
        parts, epochs = (loaded.setting(f"algorithm.{name}_per_rollout", 1) for name in ("optimizer_steps", "epochs"))
        key: dict[str, Any] = {
            "table": run.case.table,
            "groups": ", ".join(run.case.groups),
            "case": run.case.name,
            "task": run.case.task,
        }
        key |= {"regime": run.regime, "seed": run.seed, "updates": parts * epochs}
        for row in loaded.rows:
            leg = _leg_of(row["step"], run)
            path = directory / TUNED.format(leg=leg)
            described = {
                "leg": leg,
                "setting": json.dumps(run.case.legs[leg - 1].overrides if leg else {}, sort_keys=True),
                "tuned": path.read_text(encoding="utf-8") if path.exists() else None,
            }
            found.append({**key, **described, "step": row["step"], **{name: row.get(name) for name in _METRICS}})
    return found


def write_results(path: Path, results: Results) -> None:
    """All rows as one parquet file."""
    kinds = [(name, pyarrow.string()) for name in _WORDS] + [(name, pyarrow.int64()) for name in _NUMBERS]
    schema = pyarrow.schema([*kinds, *((name, pyarrow.float64()) for name in _METRICS)])
    write_parquet(path, [pyarrow.Table.from_pylist(results, schema=schema)])


def runs_of(results: Results) -> dict[RunKey, Results]:
    """The rows of each run, by step."""
    return grouped(results, RunKey)


def leg(rows: Results, number: int) -> Results:
    """The rows of a leg; -1 is the last one."""
    wanted = max(row["leg"] for row in rows) if number < 0 else number
    return [row for row in rows if row["leg"] == wanted]


def last_quarter(rows: Results) -> Results:
    """The last quarter of some rows."""
    return rows[-max(1, len(rows) // 4) :]


def errors_of(rows: Results) -> list[float]:
    """H of the whole rollout minus the target, nats."""
    pairs = zip(series(rows, "entropy/rollout"), series(rows, "entropy/target"), strict=True)
    return [entropy - target for entropy, target in pairs]


def tracking(rows: Results) -> Tracking:
    """How well entropy kept to its target over `rows`."""
    errors, targets, alphas = errors_of(rows), series(rows, "entropy/target"), series(rows, "entropy/alpha")
    target = fmean(targets)
    return Tracking(
        target=target,
        entropy=fmean(series(rows, "entropy/rollout")),
        offset=abs(fmean(errors)) / target,
        error=fmean(map(abs, errors)),
        inside=fmean(abs(error) <= BAND * aim for error, aim in zip(errors, targets, strict=True)),
        alpha=fmean(alphas),
        saturated=_saturated(alphas),
        reward=fmean(series(rows, "reward/mean")[-LAST_STEPS:]),
    )


def recovery(rows: Results) -> Recovery:
    """What followed a change, where `rows` begins with the first step after it."""
    errors, alphas, target = errors_of(rows), series(rows, "entropy/alpha"), series(rows, "entropy/target")[-1]
    smooth = smoothed(errors)
    # The side the change pushed entropy to: that of the largest error.
    side = math.copysign(1.0, max(smooth, key=abs))
    settled = settled_after(smooth, BAND * target)
    wound_up = sum(
        abs(alpha) >= 1 and alpha * mean < 0 and abs(mean) > BAND * target
        for alpha, mean in zip(alphas, smooth, strict=True)
    )
    return Recovery(
        largest_error=max(map(abs, smooth)) / target,
        settled_after=settled if settled < len(smooth) else None,
        overshoot=max(0.0, *(-side * mean for mean in smooth)) / target,
        wound_up=wound_up,
        saturated=_saturated(alphas),
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, SMOOTHING_STEPS at most."""
    return [fmean(values[max(0, end - SMOOTHING_STEPS) : end]) for end in range(1, len(values) + 1)]


def plant_of(rows: Results, updates: int) -> Plant:
    """What a leg in which alpha varied says about entropy, per optimizer step.

    Raises:
        ValueError: see `identify_plant`.
    """
    return identify_plant(series(rows, "entropy/rollout"), series(rows, "entropy/alpha"), updates)


def _saturated(alphas: Sequence[float]) -> float:
    return fmean(abs(alpha) >= 1 for alpha in alphas)


def _leg_of(step: int, run: CaseRun) -> int:
    if run.before is not None and step <= run.before.steps[-1]:
        return 0
    return next(number for number, last in enumerate(run.steps, start=1) if step <= last)
