"""The figures of a report. Each takes runs and a theme, and gives None where no run has what it shows."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from megatron_entropic.observability.metrics import ENTROPY_BAND, TURNS_APART
from megatron_entropic.reports.lines import (
    Line,
    Theme,
    any_finite,
    colours,
    draw_line,
    finish,
    legend,
    page_style,
    short,
)
from megatron_entropic.reports.run import Run

_WIDE, _HALF = (10.8, 3.6), (5.3, 3.1)
_BENCHMARK_METRIC = re.compile(r"evaluation/(.+)/avg")
_MARKERS = "os^Dv"
_PHASES = ("generate", "reward", "score", "update", "publish", "checkpoint")


Draw = Callable[[Axes, Sequence[Run], Theme], bool]


@dataclass(frozen=True)
class Plot:
    """A figure of the report: how it is called, what to look for, and how it is drawn."""

    slug: str
    title: str
    caption: str
    wide: bool
    draw: Draw
    """Function that draws on the axes; it returns False if there is nothing to show."""


def render(plot: Plot, runs: Sequence[Run], theme: Theme) -> bytes | None:
    """A figure as PNG, None if no run has the metrics for it."""
    with matplotlib.rc_context(page_style(theme)):
        figure = Figure(figsize=_WIDE if plot.wide else _HALF, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if not plot.draw(axes, runs, theme):
            return None
        if len(runs) == 1:
            for stretch in runs[0].stretches[1:]:
                axes.axvline(stretch.steps[0] - 0.5, color=theme.muted, linewidth=0.9, linestyle=(0, (1, 3)))
        buffer = io.BytesIO()
        canvas.print_png(buffer)
        return buffer.getvalue()


def _lines(*shown: Line, unit: str, floor: float | None = None) -> Draw:
    """Function that draws metrics, a line a run each."""

    def draw(axes: Axes, runs: Sequence[Run], theme: Theme) -> bool:
        drawn = [draw_line(axes, runs, line, theme) for line in shown]
        axes.set_ylabel(unit)
        finish(axes, floor=floor)
        legend(axes, only_if=len(runs) > 1 or len(shown) > 1)
        return any(drawn)

    return draw


def _entropy(axes: Axes, runs: Sequence[Run], theme: Theme) -> bool:
    """Draw H of every run, and the band of each distinct target."""
    drawn = draw_line(axes, runs, Line("entropy/mean"), theme)
    stretches = [stretch for run in runs for stretch in run.stretches]
    for target in sorted({stretch.target for stretch in stretches if stretch.target is not None}):
        label = f"target {target:g} \u00b1 {ENTROPY_BAND:.0%}"
        # Only where it held: a resumed run may have had another one before.
        for first, last in {(run.steps[0] - 0.5, run.steps[-1] + 0.5) for run in stretches if run.target == target}:
            band = (target * (1 - ENTROPY_BAND), target * (1 + ENTROPY_BAND))
            axes.fill_between([first, last], *band, color=theme.good, alpha=0.14, linewidth=0)
            axes.plot([first, last], [target] * 2, color=theme.good, linewidth=1.2, linestyle=(0, (5, 3)), label=label)
            label = ""
    axes.set_ylabel("nats per token")
    finish(axes, floor=0.0)
    legend(axes)
    return drawn


def _alpha(axes: Axes, runs: Sequence[Run], theme: Theme) -> bool:
    """Draw alpha of every controlled run with its P and I parts, and the limits it is clipped to.

    One run: a colour for each of the three. Several: a colour for each run, its parts dotted and dashed.
    """
    drawn = False
    dashes = {"entropy/proportional": (0, (1.2, 1.6)), "entropy/integral_term": (0, (5, 2))}
    for run, colour in zip(runs, colours(theme, len(runs)), strict=True):
        values = run.series("entropy/alpha")
        if all(stretch.target is None for stretch in run.stretches) or not any_finite(values):
            continue
        drawn = True
        alone = len(runs) == 1
        for index, (name, part_of) in enumerate(
            (("entropy/proportional", "P"), ("entropy/integral_term", "I")), start=1
        ):
            part = run.series(name)
            if any_finite(part):
                style: dict[str, Any] = (
                    {"color": theme.runs[index], "label": f"{part_of} part"}
                    if alone
                    else {"color": colour, "linestyle": dashes[name], "alpha": 0.75}
                )
                axes.plot(run.steps, part, linewidth=1.2, **style)
        axes.plot(run.steps, values, color=colour, label="alpha" if alone else run.name)
    for limit in (-1.0, 1.0):
        axes.axhline(limit, color=theme.muted, linewidth=0.9, linestyle=(0, (2, 3)))
    axes.axhline(0.0, color=theme.muted, linewidth=0.9)
    axes.set_ylim(-1.15, 1.15)
    axes.set_ylabel("raises H   \u2190   0   \u2192   lowers H")
    finish(axes)
    legend(axes)
    return drawn


def _turn_entropy(axes: Axes, runs: Sequence[Run], theme: Theme) -> bool:
    """Draw the entropy of each turn of one run; of several runs that of the first turn and of the second."""
    if len(runs) > 1:
        shown = [(Line("entropy/turn_1"), theme), (Line("entropy/turn_2", dashed=True), theme)]
    else:
        turns = range(1, TURNS_APART + 1)
        shown = [(Line(f"entropy/turn_{turn}", str(turn)), _turned(theme, turn)) for turn in turns]
    drawn = [draw_line(axes, runs, line, colours_of_line) for line, colours_of_line in shown]
    axes.set_ylabel("nats")
    finish(axes, floor=0.0)
    legend(axes)
    return any(drawn)


def _turned(theme: Theme, turn: int) -> Theme:
    """The theme with the colour of a turn first."""
    return replace(theme, runs=(colours(theme, turn)[-1],))


def _engines(axes: Axes, runs: Sequence[Run], theme: Theme) -> bool:
    """Draw the share of the time in which engines worked."""
    drawn = draw_line(axes, runs, Line("rollout/busy_fraction"), theme)
    axes.set_ylim(0, 1.05)
    finish(axes)
    legend(axes)
    return drawn


def _benchmarks(axes: Axes, runs: Sequence[Run], theme: Theme) -> bool:
    """Draw avg@N (solid) and pass@N (dashed) of every benchmark that was answered during training.

    One run: a colour for each benchmark. Several: a colour for each run, a marker for each benchmark.
    """
    found = (_BENCHMARK_METRIC.fullmatch(key) for run in runs for row in run.rows for key in row)
    names = list(dict.fromkeys(match[1] for match in found if match))
    for run, run_colour in zip(runs, colours(theme, len(runs)), strict=True):
        for name, benchmark_colour, marker in zip(names, colours(theme, len(names)), cycle(_MARKERS), strict=False):
            label = name if len(runs) == 1 else run.name if len(names) == 1 else f"{run.name}: {name}"
            colour = benchmark_colour if len(runs) == 1 else run_colour
            for metric, style in (("avg", {"label": label}), ("pass", {"linestyle": (0, (4, 2)), "linewidth": 1.3})):
                # Most steps have none: only what was measured is joined.
                values = zip(run.steps, run.series(f"evaluation/{name}/{metric}"), strict=True)
                points = [(step, value) for step, value in values if math.isfinite(value)]
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, **style)
    axes.set_ylabel("share of responses or problems")
    finish(axes, floor=0.0)
    legend(axes)
    return bool(names)


def _mismatch(axes: Axes, runs: Sequence[Run], theme: Theme) -> bool:
    """Draw the largest (solid) and mean (dashed) difference of every run; a log scale has no zeros."""
    largest = Line("mismatch/logprob_abs_max", "largest", positive=True)
    drawn = _lines(largest, Line("mismatch/logprob_abs_mean", "mean", positive=True, dashed=True), unit="nats")
    if not drawn(axes, runs, theme):
        return False
    axes.set_yscale("log")
    # The default labels are mathematics, which the style switches off.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True


def _time(axes: Axes, runs: Sequence[Run], theme: Theme) -> bool:
    """Draw where the time of a step goes.

    One run: seconds of each phase over the steps. Several: mean seconds of each phase, side by side.
    """
    timed = [run for run in runs if run.finite("time/step_s")]
    if not timed:
        return False
    names = [name for name in _PHASES if any(name in run.phases for run in timed)]
    names += sorted({name for run in timed for name in run.phases} - set(names))
    colours = [theme.phases[i % (len(theme.phases) - 1)] for i in range(len(names))] + [theme.phases[-1]]
    seconds = [_phase_seconds(run, names) for run in timed]
    labels = [*names, "other"]
    if len(timed) == 1:
        axes.stackplot(timed[0].steps, seconds[0], labels=labels, colors=colours, alpha=0.9, linewidth=0)
        # One slow step, such as the first, would flatten all the others.
        axes.set_ylim(0, 1.25 * max(float(np.percentile(seconds[0].sum(axis=0), 95)), 1e-3))
        axes.set_ylabel("seconds a step")
        finish(axes)
    else:
        left = np.zeros(len(timed))
        for index, (label, colour) in enumerate(zip(labels, colours, strict=True)):
            width = np.array([part[index].mean() for part in seconds])
            axes.barh(range(len(timed)), width, left=left, color=colour, label=label, height=0.55)
            left += width
        axes.set_yticks(range(len(timed)), [short(run.name) for run in timed])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("mean seconds a step")
    legend(axes)
    return True


def _phase_seconds(run: Run, names: Sequence[str]) -> np.ndarray:
    """Seconds [phases + 1, steps] of each phase; the last row is the time that no phase accounts for."""
    parts = np.nan_to_num(np.array([run.series(f"time/{name}_s") for name in names]).reshape(len(names), -1))
    total = np.nan_to_num(np.array(run.series("time/step_s")))
    return np.vstack([parts, np.maximum(0.0, total - parts.sum(axis=0))])


PLOTS = (
    Plot(
        "entropy",
        "Entropy",
        "Mean entropy of the policy over all response tokens, at the rollout temperature. The controller holds it at "
        "the dashed line; without one it usually falls as the policy grows sure of itself.",
        True,
        _entropy,
    ),
    Plot(
        "alpha",
        "The controller",
        "alpha = clip(K_p e + K_i sum(e), -1, 1) with e = H - target. Below zero it holds likely tokens back and "
        "raises entropy; at the dotted limits it has no authority left. In a comparison the P part is dotted, the I "
        "part dashed.",
        True,
        _alpha,
    ),
    Plot(
        "authority",
        "What alpha acts on",
        "Share of tokens with pi > tau (dashed), and of those that also have an advantage (solid): near 0 the "
        "controller has nothing to move.",
        False,
        _lines(
            Line("entropy/actuated_fraction", "pi > tau and A \u2260 0"),
            Line("entropy/high_prob_fraction", "pi > tau", dashed=True),
            unit="share of tokens",
            floor=0.0,
        ),
    ),
    Plot(
        "entropy_by_outcome",
        "Entropy by outcome",
        "Mean entropy over the tokens of correct (solid) and wrong (dashed) responses.",
        False,
        _lines(
            Line("entropy/correct", "correct", smooth=True),
            Line("entropy/wrong", "wrong", smooth=True, dashed=True),
            unit="nats per token",
            floor=0.0,
        ),
    ),
    Plot(
        "reward",
        "Reward",
        "Mean reward of a step's responses, and its rolling mean.",
        False,
        _lines(Line("reward/mean", smooth=True), unit="mean reward"),
    ),
    Plot(
        "benchmarks",
        "Held-out problems",
        "Answers to the benchmarks that were right (avg@N, solid), and problems with a right answer among N (dashed).",
        False,
        _benchmarks,
    ),
    Plot(
        "teacher",
        "Distance to the teacher",
        "KL(policy || teacher) of a token, mean of a step.",
        False,
        _lines(Line("distillation/kl"), unit="nats per token", floor=0.0),
    ),
    Plot(
        "mismatch",
        "Training against rollout",
        "Difference of log-probs between the policy and the engines that sampled, for the same tokens and weights: "
        "the largest of a step (solid) and the mean (dashed).",
        False,
        _mismatch,
    ),
    Plot(
        "staleness",
        "Staleness",
        "Weight versions by which a step's tokens are older than the policy that learns from them: the oldest (solid) "
        "and the mean (dashed). rollout.lag bounds it.",
        False,
        _lines(
            Line("staleness/versions_max", "oldest"),
            Line("staleness/versions_mean", "mean", dashed=True),
            unit="versions",
            floor=0.0,
        ),
    ),
    Plot(
        "engines",
        "Engines at work",
        "Share of the time in which an engine ran forward passes, mean over engines. What is missing is waiting for "
        "tasks, that is for the policy: a larger rollout.lag fills it.",
        False,
        _engines,
    ),
    Plot(
        "turns",
        "Conversations",
        "Turns of the policy in a conversation, mean of a step, and its rolling mean.",
        False,
        _lines(Line("environment/turns_mean", smooth=True), unit="turns of the policy", floor=0.0),
    ),
    Plot(
        "turn_entropy",
        "Entropy by turn",
        "Mean entropy over the tokens that the policy wrote in each turn; in a comparison of the first turn (solid) "
        "and the second (dashed).",
        False,
        _turn_entropy,
    ),
    Plot(
        "response_length",
        "Response length",
        "Mean number of tokens of a response.",
        False,
        _lines(Line("response/length_mean", smooth=True), unit="tokens"),
    ),
    Plot(
        "gradient_norm",
        "Gradient norm",
        "Over all parameters, before clipping.",
        False,
        _lines(Line("grad_norm", smooth=True), unit="norm before clipping", floor=0.0),
    ),
    Plot("time", "Where the time goes", "Wall time by phase of a step.", True, _time),
)
