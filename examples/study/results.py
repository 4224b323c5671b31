"""What the runs of the study said, in one table and in a few numbers for each run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow
from chain import STEPWISE
from grid import BENCHMARKS, Cell
from rows import Results, grouped, series

from megatron_entropic.evaluation.generations import read_generations
from megatron_entropic.evaluation.store import generations_path
from megatron_entropic.files.atomic import write_parquet
from megatron_entropic.reports.run import load_run

LAST_STEPS = 20
"""Steps whose mean is the final entropy."""
TRACKERS = ("p", "pi", "aec")
"""Controllers that compare entropy with a target."""
FEEDBACK = ("p", "pi")
"""Controllers whose alpha follows the entropy."""
_METRICS = ("reward/mean", "entropy/mean", "entropy/target", "entropy/alpha", "entropy/coefficient", "time/step_s")
_JUDGED = ("pass/1", "pass/n", "stepwise")
_KEYS = ("stage", "regime", "method", "setting_index", "setting", "controller", "samples", "seed")


@dataclass(frozen=True)
class RunNumbers:
    """The numbers of one run that the tables show; None where they mean nothing."""

    pass_1: float
    pass_n: float
    entropy: float
    """Mean of the last `LAST_STEPS` steps, nats."""
    tracking_error: float | None
    """Mean |H - target| over the last quarter of the steps, nats."""
    stepwise: float
    """Share of the last evaluation's responses that go step by step."""
    saturated: float | None
    """Share of all steps with |alpha| = 1."""
    training_s: float


@dataclass(frozen=True)
class RunKey:
    """Which run."""

    stage: str
    regime: str
    method: str
    setting_index: int
    setting: str
    controller: str
    samples: int
    """n of pass/n."""
    seed: int


def read_results(runs: Iterable[tuple[Cell, Path]]) -> Results:
    """The rows of finished runs.

    Raises:
        ValueError: a run without readable metrics, or without an evaluation of its last step.
    """
    found: Results = []
    for cell, directory in runs:
        run = load_run(directory)
        evaluation = f"evaluation/{BENCHMARKS[cell.stage]}"
        if run.rows[-1].get(f"{evaluation}/avg") is None:
            raise ValueError(f"{directory}: the last step was not evaluated: train.steps % evaluation.every_steps != 0")
        key = {
            "stage": cell.stage,
            "regime": cell.regime,
            "method": cell.method,
            "setting_index": cell.setting_index,
            "setting": json.dumps(cell.setting, sort_keys=True),
            "controller": run.setting("entropy_control.controller"),
            "samples": run.setting("evaluation.samples_per_prompt"),
            "seed": cell.seed,
        }
        for row in run.rows:
            judged: dict[str, float | None] = dict.fromkeys(_JUDGED)
            if row.get(f"{evaluation}/avg") is not None:
                responses = directory / "evaluations" / f"step_{row['step']:06d}"
                judged = {
                    "pass/1": row[f"{evaluation}/avg"],
                    "pass/n": row[f"{evaluation}/pass"],
                    "stepwise": stepwise_share(generations_path(responses, BENCHMARKS[cell.stage])),
                }
            found.append({**key, "step": row["step"], **{name: row.get(name) for name in _METRICS}, **judged})
    return found


def stepwise_share(responses: Path) -> float:
    """Share of an evaluation's stored responses that go step by step."""
    return fmean(generation.response.startswith(STEPWISE) for generation in read_generations(responses)[0])


def write_results(path: Path, results: Results) -> None:
    """All rows as one parquet file."""
    numbers = {name: pyarrow.float64() for name in (*_METRICS, *_JUDGED)}
    kinds = {name: pyarrow.int64() for name in ("setting_index", "samples", "seed", "step")} | numbers
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in (*_KEYS, "step", *numbers)])
    write_parquet(path, [pyarrow.Table.from_pylist(results, schema=schema)])


def runs_of(results: Results) -> dict[RunKey, Results]:
    """The rows of each run, by step."""
    return grouped(results, RunKey)


def run_numbers(key: RunKey, rows: Sequence[Mapping[str, Any]]) -> RunNumbers:
    """The numbers of one run."""
    entropies, targets = series(rows, "entropy/mean"), series(rows, "entropy/target")
    alphas = [value for value in series(rows, "entropy/alpha") if math.isfinite(value)]
    quarter = -(-len(rows) // 4)
    errors = [abs(h - aim) for h, aim in zip(entropies, targets, strict=True)][-quarter:]
    return RunNumbers(
        pass_1=rows[-1]["pass/1"],
        pass_n=rows[-1]["pass/n"],
        entropy=fmean(entropies[-LAST_STEPS:]),
        tracking_error=fmean(errors) if key.controller in TRACKERS else None,
        stepwise=rows[-1]["stepwise"],
        saturated=fmean(abs(alpha) >= 1 for alpha in alphas) if key.controller in FEEDBACK and alphas else None,
        training_s=sum(series(rows, "time/step_s")),
    )


def chosen_settings(search: Results, runs_per_method: int) -> dict[tuple[str, str], int]:
    """(regime, method): the setting with the highest mean pass@1 over the seeds of the search; of equals the first.

    Args:
        search: of finished runs.
        runs_per_method: settings times seeds; methods with fewer runs are left out, since their search goes on.
    """
    scores: dict[tuple[str, str], dict[int, list[float]]] = {}
    for key, rows in runs_of(search).items():
        by_setting = scores.setdefault((key.regime, key.method), {})
        by_setting.setdefault(key.setting_index, []).append(run_numbers(key, rows).pass_1)
    return {
        place: min(by_setting, key=lambda index: (-fmean(by_setting[index]), index))
        for place, by_setting in scores.items()
        if sum(map(len, by_setting.values())) == runs_per_method
    }
