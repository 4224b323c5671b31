"""The page about a study of control: a table for each question, entropy, target and alpha over the steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from figures import LINE, PANEL_INCHES, TARGET
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from report import NOTHING, REPORT_FILE, header, mean_and_error, row_of_cells
from rows import Results, series
from tracking_results import (
    BAND,
    SMOOTHING_STEPS,
    RunKey,
    last_quarter,
    leg,
    plant_of,
    recovery,
    runs_of,
    tracking,
)

Runs = dict[RunKey, Results]
_DPI = 90
_PANELS_IN_A_ROW = 4
_TITLES = {
    "targets": "Targets",
    "offset": "The offset of P",
    "disturbances": "Disturbances",
    "tuning": "Proposed gains",
    "sensitivity": "Sensitivity",
}
_NOTES = {
    "targets": f"The last quarter of each run; band: within {BAND:.0%} of the target; saturated: share of all steps.",
    "offset": "H - target in the last half of a leg with P alone. By the probe: b / (g K_p) of the leg that identified "
    "the plant; by PI: the mean alpha that PI needed to hold the same target (last quarter of the run before) / K_p.",
    "disturbances": f"After the change, in means of {SMOOTHING_STEPS} steps. Settled: rollouts until they stay within "
    f"{BAND:.0%} of the target; wound up: steps with alpha at the limit that the error had left.",
    "tuning": "g and b per optimizer step; asked and settled in rollouts, from the first with the proposed gains; "
    f"settled: means of {SMOOTHING_STEPS} steps stay within {BAND:.0%} of the target.",
    "sensitivity": "Mean \u00b1 standard error over seeds; \\|H - target\\|, band and alpha: last quarter of the run; "
    "saturated: share of all steps; reward: last 20 steps.",
}


def write_tracking_report(results: Results, output: Path) -> Path:
    """Write the page and its figures into a folder; returns the page's path."""
    output.mkdir(parents=True, exist_ok=True)
    runs = runs_of(results)
    page = output / REPORT_FILE
    page.write_text("\n".join(_page(runs, output)) + "\n", encoding="utf-8")
    return page


def _page(runs: Runs, output: Path) -> Iterator[str]:
    tables = {"targets": _targets, "offset": _offsets, "disturbances": _disturbances, "tuning": _tuning}
    yield "# Control"
    yield ""
    yield "H is measured on the whole rollout before its first update, in nats per token."
    for name, title in _TITLES.items():
        own = {key: rows for key, rows in runs.items() if key.table == name}
        if not own:
            continue
        yield from ("", f"## {title}", "", _NOTES[name])
        if name == "sensitivity":
            for group in dict.fromkeys(group for key in own for group in key.groups.split(", ")):
                members = {key: rows for key, rows in own.items() if group in key.groups.split(", ")}
                yield from ("", f"### {group}", "", *_sensitivity(members))
                yield from _figure(members, f"{name}-{group}", output)
        else:
            yield from ("", *tables[name](own))
            yield from _figure(own, name, output)


def _targets(runs: Runs) -> Iterator[str]:
    yield from header("case", "regime", "target", "H", "offset", "\\|H - target\\|", "in band", "alpha", "saturated")
    for key, rows in runs.items():
        own = [row for row in rows if row["leg"] > 0]
        found, all_steps = tracking(last_quarter(own)), tracking(own)
        yield row_of_cells(
            key.case,
            key.regime,
            f"{found.target:.2f}",
            f"{found.entropy:.3f}",
            f"{found.offset:.1%}",
            f"{found.error:.3f}",
            f"{found.inside:.0%}",
            f"{found.alpha:+.2f}",
            f"{all_steps.saturated:.0%}",
        )


def _offsets(runs: Runs) -> Iterator[str]:
    yield from header("case", "regime", "g", "b", "K_p", "by the probe", "by PI", "measured", "saturated")
    for key, rows in runs.items():
        plant = plant_of(leg(rows, 1), key.updates)
        holding = tracking(last_quarter(leg(rows, 0))).alpha
        for number in range(2, rows[-1]["leg"] + 1):
            own = leg(rows, number)
            kp = float(json.loads(own[0]["setting"])["entropy_control.kp"])
            found = tracking(own[len(own) // 2 :])
            yield row_of_cells(
                key.case,
                key.regime,
                f"{plant.gain:.2g} \u00b1 {plant.gain_error:.1g}",
                f"{plant.drift:+.2g}",
                f"{kp:g}",
                f"{plant.drift / (plant.gain * kp):+.3f}",
                f"{holding / kp:+.3f}",
                f"{found.entropy - found.target:+.3f}",
                f"{found.saturated:.0%}",
            )


def _disturbances(runs: Runs) -> Iterator[str]:
    yield from header(
        "case", "regime", "largest error", "settled", "overshoot", "wound up", "saturated", "H at the end"
    )
    for key, rows in runs.items():
        own = leg(rows, -1)
        found, end = recovery(own), tracking(last_quarter(own))
        yield row_of_cells(
            key.case,
            key.regime,
            f"{found.largest_error:.0%}",
            NOTHING if found.settled_after is None else str(found.settled_after),
            f"{found.overshoot:.0%}",
            str(found.wound_up),
            f"{found.saturated:.0%}",
            f"{end.entropy:.3f} for {end.target:.2f}",
        )


def _tuning(runs: Runs) -> Iterator[str]:
    yield from header(
        *("case", "regime", "g", "b", "K_p", "K_i", "alpha at first", "H", "target"),
        *("asked", "proposed", "settled", "saturated", "in band"),
    )
    for key, rows in runs.items():
        own = leg(rows, -1)
        tuned = json.loads(own[0]["tuned"])
        plant, proposal = tuned["plant"], tuned["proposal"]
        found, end = recovery(own), tracking(last_quarter(own))
        yield row_of_cells(
            key.case,
            key.regime,
            f"{plant['gain']:.2g} \u00b1 {plant['gain_error']:.1g}",
            f"{plant['drift']:+.2g}",
            f"{proposal['kp']:.3g}",
            f"{proposal['ki']:.3g}",
            f"{proposal['initial_alpha']:+.2f}",
            f"{own[0]['entropy/rollout']:.3f}",
            f"{end.target:.2f}",
            f"{tuned['asked_steps']:g}",
            f"{proposal['settling_steps'] / key.updates:.0f}",
            NOTHING if found.settled_after is None else str(found.settled_after),
            f"{found.saturated:.0%}",
            f"{end.inside:.0%}",
        )


def _sensitivity(runs: Runs) -> Iterator[str]:
    yield from header("case", "regime", "seeds", "H", "\\|H - target\\|", "in band", "alpha", "saturated", "reward")
    for case, regime in dict.fromkeys((key.case, key.regime) for key in runs):
        own = [rows for key, rows in runs.items() if (key.case, key.regime) == (case, regime)]
        ends = [tracking(last_quarter(rows)) for rows in own]
        yield row_of_cells(
            case,
            regime,
            str(len(own)),
            mean_and_error([end.entropy for end in ends]),
            mean_and_error([end.error for end in ends]),
            mean_and_error([end.inside for end in ends], 2),
            mean_and_error([end.alpha for end in ends], 2),
            mean_and_error([tracking(rows).saturated for rows in own], 2),
            mean_and_error([tracking(rows).reward for rows in own]),
        )


def _figure(runs: Runs, name: str, output: Path) -> Iterator[str]:
    """A figure for each regime: entropy above, alpha below, a column for each case."""
    for regime in dict.fromkeys(key.regime for key in runs):
        cases = dict.fromkeys(key.case for key in runs if key.regime == regime)
        lines = [[rows for key, rows in runs.items() if (key.case, key.regime) == (case, regime)] for case in cases]
        file = f"{name}-{regime}".replace(" ", "-") + ".png"
        write_figure(dict(zip(cases, lines, strict=True)), output / file)
        yield from ("", f"![{name}, {regime}]({file})")


def write_figure(cases: dict[str, list[Results]], path: Path) -> None:
    """Entropy with its target, and below it alpha, of the runs of each case; a line marks where a leg begins."""
    columns = min(_PANELS_IN_A_ROW, len(cases))
    blocks = -(-len(cases) // columns)
    size = (PANEL_INCHES[0] * columns * 0.85, PANEL_INCHES[1] * blocks * 1.5)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2 * blocks, columns, squeeze=False, sharex="col", height_ratios=[3, 2] * blocks)
    places = [(block, column) for block in range(blocks) for column in range(columns)]
    for (block, column), (case, runs) in zip(places, cases.items(), strict=False):
        above, below = panels[2 * block][column], panels[2 * block + 1][column]
        above.set_title(case, fontsize=9)
        for rows in runs:
            _entropy_panel(above, rows)
            _alpha_panel(below, rows)
    for block, column in places[len(cases) :]:
        panels[2 * block][column].set_axis_off()
        panels[2 * block + 1][column].set_axis_off()
    panels[0][0].set_ylabel("nats per token", fontsize=8)
    panels[1][0].set_ylabel("alpha", fontsize=8)
    canvas.print_png(str(path))


def _entropy_panel(axes: Axes, rows: Results) -> None:
    steps, targets = [row["step"] for row in rows], series(rows, "entropy/target")
    axes.plot(steps, series(rows, "entropy/rollout"), color=LINE, linewidth=1.0)
    axes.plot(steps, targets, color=TARGET, linewidth=1.0, linestyle=(0, (5, 3)))
    low, high = ([aim * factor for aim in targets] for factor in (1 - BAND, 1 + BAND))
    axes.fill_between(steps, low, high, color=TARGET, alpha=0.12, linewidth=0)
    _mark_legs((axes,), rows)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7)


def _alpha_panel(axes: Axes, rows: Results) -> None:
    steps = [row["step"] for row in rows]
    axes.plot(steps, series(rows, "entropy/alpha"), color=LINE, linewidth=0.9)
    if any(math.isfinite(value) for value in series(rows, "entropy/integral_term")):
        axes.plot(steps, series(rows, "entropy/integral_term"), color="0.5", linewidth=0.9)
    axes.set_ylim(-1.1, 1.1)
    _mark_legs((axes,), rows)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7)


def _mark_legs(panels: Sequence[Axes], rows: Results) -> None:
    for one, other in pairwise(rows):
        if one["leg"] != other["leg"]:
            for axes in panels:
                axes.axvline(one["step"] + 0.5, color="0.4", linewidth=0.8, linestyle=":")
