"""The page about the study: tables with paired differences, what was searched, entropy and alpha over the steps."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from figures import write_figures
from grid import Grid
from results import LAST_STEPS, RunKey, RunNumbers, run_numbers, runs_of
from rows import Results

from megatron_entropic.evaluation.summary import bootstrap_weights, interval, sign_flip_p_value

REPORT_FILE = "report.md"
NOTHING = "-"
Numbers = dict[RunKey, RunNumbers]


@dataclass(frozen=True)
class Paired:
    """A method minus the baseline, seed by seed."""

    seeds: int
    difference: float
    low: float
    high: float
    """95 % percentile bootstrap over seeds."""
    p_value: float
    """Two-sided, sign flips."""


def write_study_report(results: Results, grid: Grid, output: Path) -> Path:
    """Write the page and its figures into a folder; returns the page's path."""
    output.mkdir(parents=True, exist_ok=True)
    runs = runs_of(results)
    numbers = {key: run_numbers(key, rows) for key, rows in runs.items()}
    figures = write_figures(runs, grid, output)
    page = output / REPORT_FILE
    page.write_text("\n".join(_page(numbers, figures, grid)) + "\n", encoding="utf-8")
    return page


def mean_and_error(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard error of the mean; of one value no error."""
    if not values:
        return NOTHING
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} \u00b1 {stdev(values) / math.sqrt(len(values)):.{digits}f}"


def paired(first: dict[int, float], second: dict[int, float]) -> Paired | None:
    """Second minus first over the seeds that both have; None with fewer than two of them."""
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        return None
    differences = np.array([second[seed] - first[seed] for seed in seeds])
    draw = zlib.crc32(b"paired differences")
    low, high = interval(bootstrap_weights(len(seeds), seed=draw) @ differences)
    return Paired(len(seeds), float(differences.mean()), low, high, sign_flip_p_value(differences, seed=draw))


def _page(numbers: Numbers, figures: dict[str, Path], grid: Grid) -> Iterator[str]:
    samples = "/".join(str(n) for n in sorted({key.samples for key in numbers}))
    yield "# The study"
    yield ""
    yield (
        f"Mean \u00b1 standard error over seeds. pass@1 and pass@{samples} on problems that are in no training file; "
        f"stepwise: share of answers in that form; H: mean of the last {LAST_STEPS} steps, nats; \\|H - target\\|: "
        "last quarter of the steps; saturated: steps with \\|alpha\\| = 1; seconds: training without start-up. "
        f"Difference: pass@1 minus that of {grid.baseline} with the same seed, 95 % bootstrap interval over seeds; p: "
        "sign flips."
    )
    for regime in grid.regimes:
        yield from ("", f"## {regime}", "")
        yield from _main_table(numbers, regime, samples, grid)
        yield from _shown(figures, f"report-{regime}-")
    if grid.searches:
        seeds = ", ".join(map(str, grid.search_seeds))
        yield from ("", "## What was searched", "", f"Seeds {seeds}, which are not in the tables above.", "")
        yield from _search_table(numbers, grid)
        yield from _shown(figures, "search-")


def _shown(figures: dict[str, Path], beginning: str) -> Iterator[str]:
    for name, path in figures.items():
        if name.startswith(beginning):
            yield from ("", f"![{name}]({path.name})")


def _main_table(numbers: Numbers, regime: str, samples: str, grid: Grid) -> Iterator[str]:
    columns = (
        "method",
        "seeds",
        "pass@1",
        f"pass@{samples}",
        "stepwise",
        "H",
        "\\|H - target\\|",
        "saturated",
        "seconds",
    )
    yield from header(*columns, "difference", "p", "setting")
    baseline = _of(numbers, "report", regime, grid.baseline)
    for method in grid.methods:
        own = _of(numbers, "report", regime, method.name)
        if not own:
            yield row_of_cells(method.name, "0", *[NOTHING] * (len(columns) + 1))
            continue
        compared = None if method.name == grid.baseline else paired(_pass_1(baseline), _pass_1(own))
        shown = [NOTHING, NOTHING]
        if compared is not None:
            between = f"{compared.low:+.3f} to {compared.high:+.3f}"
            shown = [f"{compared.difference:+.3f} ({between})", f"{compared.p_value:.3f}"]
        yield row_of_cells(method.name, *_cells(own), *shown, _setting(next(iter(own)).setting))


def _search_table(numbers: Numbers, grid: Grid) -> Iterator[str]:
    yield from header(
        "regime",
        "method",
        "setting",
        "seeds",
        "pass@1",
        "pass@n",
        "stepwise",
        "H",
        "\\|H - target\\|",
        "saturated",
        "seconds",
    )
    for regime in grid.regimes:
        for method in grid.methods:
            found = _of(numbers, "search", regime, method.name)
            for index, setting in enumerate(method.settings):
                own = {key: value for key, value in found.items() if key.setting_index == index}
                yield row_of_cells(regime, method.name, _setting(json.dumps(setting)), *_cells(own))


def _cells(own: Numbers) -> list[str]:
    """Number of seeds and the mean numbers of runs that differ in their seed."""

    def column(read: Callable[[RunNumbers], float | None], digits: int = 3) -> str:
        return mean_and_error([value for run in own.values() if (value := read(run)) is not None], digits)

    return [
        str(len(own)),
        column(lambda run: run.pass_1),
        column(lambda run: run.pass_n),
        column(lambda run: run.stepwise, 2),
        column(lambda run: run.entropy),
        column(lambda run: run.tracking_error),
        column(lambda run: run.saturated, 2),
        column(lambda run: run.training_s, 0),
    ]


def _of(numbers: Numbers, stage: str, regime: str, method: str) -> Numbers:
    return {
        key: value for key, value in numbers.items() if (key.stage, key.regime, key.method) == (stage, regime, method)
    }


def _pass_1(runs: Numbers) -> dict[int, float]:
    """By seed."""
    return {key.seed: run.pass_1 for key, run in runs.items()}


def _setting(setting: str) -> str:
    """A setting with the last part of each key."""
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in json.loads(setting).items()) or NOTHING


def header(*names: str) -> tuple[str, str]:
    """The first two lines of a table."""
    return row_of_cells(*names), "|" + "---|" * len(names)


def row_of_cells(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"
