"""Figures of the study: a panel for each method.

Of what is reported a line for each seed, and their mean; of the search a line for each setting, its mean over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path

import numpy as np
from grid import Grid
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results import FEEDBACK, TRACKERS, RunKey
from rows import Results

PANELS_IN_A_ROW = 3
PANEL_INCHES = (3.4, 2.4)
_DPI = 130
LINE, TARGET = "#3461d1", "#1f9d74"
SETTINGS = ("#3461d1", "#c4561e", "#1f9d74", "#8a3fb0", "#7a7a7a", "#b8860b")
"""Colours of the settings of a search, in their order."""
_ACTED_ON = (*FEEDBACK, "constant")

Runs = dict[RunKey, Results]


def write_figures(runs: Runs, grid: Grid, output: Path) -> dict[str, Path]:
    """Entropy, alpha and reward of the runs, a PNG for each stage and regime; the files by `stage-regime-what`."""
    written = {}
    for stage, regime in product(("report", "search"), grid.regimes):
        own = {key: rows for key, rows in runs.items() if (key.stage, key.regime) == (stage, regime)}
        for what, metric, label in (
            ("entropy", "entropy/mean", "nats per token"),
            ("alpha", "entropy/alpha", "alpha"),
            ("reward", "reward/mean", "mean reward"),
        ):
            chosen = {k: v for k, v in own.items() if metric != "entropy/alpha" or k.controller in _ACTED_ON}
            methods = [method.name for method in grid.methods if any(key.method == method.name for key in chosen)]
            if methods:
                name = f"{stage}-{regime}-{what}"
                written[name] = _write(chosen, methods, metric, label, output / f"{name}.png")
    return written


def mean_series(runs: Sequence[Results], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [n], mean of the metric over runs [n]) on the steps that every run has."""
    shared = sorted(set.intersection(*({int(row["step"]) for row in rows} for rows in runs)))
    by_step = [{row["step"]: _number(row[metric]) for row in rows} for rows in runs]
    return np.array(shared), np.array([[values[step] for step in shared] for values in by_step]).mean(axis=0)


def _write(runs: Runs, methods: Sequence[str], metric: str, label: str, path: Path) -> Path:
    columns = min(PANELS_IN_A_ROW, len(methods))
    rows = -(-len(methods) // columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, method in zip(panels, methods, strict=False):
        _panel(axes, {key: rows for key, rows in runs.items() if key.method == method}, metric)
        axes.set_title(method, fontsize=9)
    for axes in panels[len(methods) :]:
        axes.set_axis_off()
    figure.supylabel(label, fontsize=9)
    figure.supxlabel("step", fontsize=9)
    canvas.print_png(str(path))
    return path


def _panel(axes: Axes, runs: Runs, metric: str) -> None:
    settings = sorted({key.setting_index for key in runs})
    searched = next(iter(runs)).stage == "search"
    for index, color in zip(settings, cycle(SETTINGS if searched else [LINE]), strict=False):
        own = {key: rows for key, rows in runs.items() if key.setting_index == index}
        for rows in own.values() if not searched else ():
            values = [_number(row[metric]) for row in rows]
            axes.plot([row["step"] for row in rows], values, color=color, alpha=0.25, linewidth=0.8)
        steps, mean = mean_series(list(own.values()), metric)
        marker = "o" if len(steps) == 1 else None
        width = 1.0 if searched else 1.6
        axes.plot(steps, mean, color=color, linewidth=width, marker=marker, label=f"setting {index + 1}")
        if metric == "entropy/mean" and next(iter(own)).controller in TRACKERS:
            target = mean_series(list(own.values()), "entropy/target")
            axes.plot(*target, color=color if searched else TARGET, linewidth=1.0, linestyle=(0, (5, 3)))
    if searched:
        axes.legend(fontsize=6, frameon=False)
    if metric == "entropy/alpha":
        axes.set_ylim(-1.1, 1.1)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
