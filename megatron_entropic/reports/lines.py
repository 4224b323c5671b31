"""Lines of a figure: colours, scales and legends that all figures of a report share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from megatron_entropic.reports.run import Run

DPI = 160
_LABEL_CHARACTERS = 40


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; its background is that of the page's panels."""

    name: str
    panel: str
    ink: str
    muted: str
    grid: str
    good: str
    runs: tuple[str, ...]
    phases: tuple[str, ...]


LIGHT = Theme(
    "light",
    panel="#ffffff",
    ink="#1d2430",
    muted="#697386",
    grid="#e6e9ef",
    good="#1f9d74",
    runs=("#3461d1", "#e0702e", "#a8459b", "#b08a14", "#4d96ad", "#7b6ad6"),
    phases=("#3461d1", "#a8459b", "#4d96ad", "#e0702e", "#1f9d74", "#b08a14", "#c3c9d4"),
)
DARK = Theme(
    "dark",
    panel="#171c26",
    ink="#e7eaf0",
    muted="#97a1b3",
    grid="#2a3140",
    good="#3ecf9b",
    runs=("#7ea2ff", "#ff9d62", "#dc86d2", "#e3c04f", "#7cc8df", "#b3a4ff"),
    phases=("#7ea2ff", "#dc86d2", "#7cc8df", "#ff9d62", "#3ecf9b", "#e3c04f", "#4a5365"),
)


def page_style(theme: Theme) -> dict[Any, Any]:
    return {
        "figure.facecolor": theme.panel,
        "axes.facecolor": theme.panel,
        "savefig.facecolor": theme.panel,
        "figure.dpi": DPI,
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.formatter.useoffset": False,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.labelcolor": theme.ink,
        # A run's name is text, not mathematics: a dollar sign in it stays one.
        "text.parse_math": False,
    }


@dataclass(frozen=True)
class Line:
    """A metric as one line a run."""

    metric: str
    label: str = ""
    """What a single run's line is called, if not by the run; several are, the dashed ones not again."""
    smooth: bool = False
    """Whether it is a rolling mean, with the raw values as a faint line behind."""
    positive: bool = False
    """Whether values that are not positive are left out, as a logarithmic scale needs it."""
    dashed: bool = False


def draw_line(axes: Axes, runs: Sequence[Run], line: Line, theme: Theme) -> bool:
    """Draw a metric of all runs; False if none has it."""
    drawn = False
    for run, colour in zip(runs, colours(theme, len(runs)), strict=True):
        values = np.array(run.series(line.metric))
        if line.positive:
            values[~(values > 0)] = np.nan
        if not np.isfinite(values).any():
            continue
        drawn = True
        window = max(1, len(values) // 15) if line.smooth else 1
        if window > 1:
            axes.plot(run.steps, values, color=colour, alpha=0.28, linewidth=1.0)
        axes.plot(
            run.steps,
            rolling_mean(values, window),
            color=colour,
            label=(line.label or run.name) if len(runs) == 1 else "" if line.dashed else run.name,
            marker="o" if len(values) == 1 else None,
            linestyle=(0, (4, 2)) if line.dashed else "-",
            linewidth=1.3 if line.dashed else 1.8,
        )
    return drawn


def rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` finite values at each position (of fewer at the start); [n] -> [n]."""
    finite = np.isfinite(values)
    totals = np.cumsum(np.where(finite, values, 0.0))
    counts = np.cumsum(finite).astype(float)
    totals[window:] -= totals[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    with np.errstate(invalid="ignore"):
        means: np.ndarray = totals / counts
    return means


def colours(theme: Theme, count: int) -> list[str]:
    return [theme.runs[index % len(theme.runs)] for index in range(count)]


def any_finite(values: Sequence[float]) -> bool:
    return any(math.isfinite(value) for value in values)


def finish(axes: Axes, *, floor: float | None = None) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    if floor is not None:
        axes.set_ylim(bottom=floor)


def legend(axes: Axes, *, only_if: bool = True) -> None:
    """Draw a legend above the axes, where it never covers a line; as many columns as its labels leave room for."""
    handles, names = axes.get_legend_handles_labels()
    if not only_if or not handles:
        return
    labels = [short(name) for name in names]
    characters = 14 * axes.figure.bbox.width / DPI
    columns = int(characters // (max(map(len, labels)) + 6))
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(handles, labels, loc="outside upper left", ncols=max(1, min(columns, len(labels))))


def short(name: str) -> str:
    """A run's name, cut to the length that a figure has room for."""
    return name if len(name) <= _LABEL_CHARACTERS else name[: _LABEL_CHARACTERS - 3] + "..."
