"""A page about one run, or about several side by side: self-contained HTML, and its figures as PNGs beside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from megatron_entropic.config.names import OFF, controller_entry
from megatron_entropic.errors import UserError
from megatron_entropic.files.paths import make_directory
from megatron_entropic.observability.metrics import ENTROPY_BAND
from megatron_entropic.observability.progress import duration
from megatron_entropic.observability.settings_history import Change, changes, flatten
from megatron_entropic.observability.values import as_number
from megatron_entropic.observability.yardsticks import MismatchYardstick
from megatron_entropic.reports import lines, plots
from megatron_entropic.reports.advice import verdicts
from megatron_entropic.reports.pages import render_page, write_page
from megatron_entropic.reports.run import LAST_STEPS, Run, Summary, load_run, summarise

REPORT_FILE = "report.html"
_SAMPLES_SHOWN = 6
_LONGEST_VALUE = 60
"""Characters shown of a metric that is not a number."""


@dataclass(frozen=True)
class Card:
    """One number of a run with its label and a note."""

    label: str
    value: str
    note: str = ""
    tone: str = ""
    """Colour of the value: good, warn, or empty for none."""


def write_report(run_dirs: Sequence[Path], output_dir: Path) -> Path:
    """Write REPORT_FILE and one PNG a figure into `output_dir`; returns the page's path.

    Args:
        run_dirs: one or several run directories; their figures are overlaid.

    Raises:
        UserError: naming every run that cannot be read, and why.
    """
    runs = _load(run_dirs)
    make_directory(output_dir)
    figures = []
    for plot in plots.PLOTS:
        light, dark = (plots.render(plot, runs, theme) for theme in (lines.LIGHT, lines.DARK))
        if light is None or dark is None:
            continue
        (output_dir / f"{plot.slug}.png").write_bytes(light)
        figures.append({"plot": plot, "light": _data_uri(light), "dark": _data_uri(dark)})
    summaries = [summarise(run) for run in runs]
    page = render_page(
        Path(__file__).parent / "report.html.jinja",
        title=" / ".join(run.name for run in runs),
        runs=[
            {
                "run": run,
                "colours": (lines.LIGHT.runs[i % len(lines.LIGHT.runs)], lines.DARK.runs[i % len(lines.DARK.runs)]),
                "facts": _facts(run, summary),
                "cards": _cards(summary, run.stretches[-1].mismatch_yardstick),
                "verdicts": verdicts(run),
                "changes": _changes(run),
                "configurations": _configurations(run),
                "samples": _samples(run),
            }
            for i, (run, summary) in enumerate(zip(runs, summaries, strict=True))
        ],
        figures=figures,
        differences=_differences(runs),
        last_metrics=_last_metrics(runs),
    )
    return write_page(output_dir / REPORT_FILE, page)


def _load(run_dirs: Sequence[Path]) -> list[Run]:
    """Read every run; the result has distinct names."""
    runs, problems = [], []
    for path in run_dirs:
        try:
            runs.append(load_run(Path(path)))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    if not runs:
        raise UserError("a report needs at least one run directory")
    for name_of in (lambda run: run.name, lambda run: run.path.resolve().name, lambda run: f"{run.name} ({run.path})"):
        names = [name_of(run) for run in runs]
        if len(set(names)) == len(names):
            break
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _facts(run: Run, summary: Summary) -> list[str]:
    """Parts of the line below a run's name."""
    planned = summary.planned_steps
    facts = [f"{summary.steps:,} of {planned:,} steps" if planned else f"{summary.steps:,} steps"]
    model = run.setting("model.hf_dir")
    if model:
        facts.append(Path(str(model)).name)
    controller = run.setting("entropy_control.controller")
    if controller == OFF:
        facts.append("no entropy control")
    elif controller and not controller_entry(str(controller)).answers_error:
        facts.append(f"controller {controller}")
    elif controller:
        integral = f", K_i {run.setting('entropy_control.ki')}" if controller == "pi" else ""
        facts.append(f"EntroPIC-{str(controller).upper()}, K_p {run.setting('entropy_control.kp')}{integral}")
    prompts, samples = run.setting("rollout.prompts_per_step"), run.setting("rollout.samples_per_prompt")
    if prompts and samples:
        facts.append(f"{prompts} prompts x {samples} responses")
    if len(run.stretches) > 1:
        facts.append(f"settings changed at step {run.stretches[-1].steps[0]:,}, dotted in the figures")
    if summary.hours is not None:
        facts.append(duration(summary.hours * 3600))
    return facts


def _cards(summary: Summary, usual_mismatch: MismatchYardstick | None) -> Iterator[Card]:
    """Yields cards of the numbers a person looks for first; those that the run does not have are left out."""
    last = f"last {LAST_STEPS} steps"
    if summary.reward is not None:
        start = "" if summary.reward_start is None else f"from {summary.reward_start:.3f} at the start"
        yield Card("Reward", f"{summary.reward:.3f}", start or last)
    if summary.entropy is not None:
        aim = "no target" if summary.target is None else f"target {summary.target:g} nats"
        yield Card("Entropy", f"{summary.entropy:.3f}", aim)
    if summary.tracking_error is not None:
        tone = "good" if summary.on_target else "warn"
        note = f"{'within' if summary.on_target else 'beyond'} {ENTROPY_BAND:.0%} of the target"
        yield Card("Mean |H \u2212 target|", f"{summary.tracking_error:.4f}", f"{last}, {note}", tone)
    if summary.saturated is not None:
        tone = "warn" if summary.saturated > 0.5 else ""
        yield Card("Alpha at its limit", f"{summary.saturated:.0%}", "of all steps under these settings", tone)
    if summary.actuated is not None:
        yield Card("Tokens alpha acts on", f"{summary.actuated:.1%}", "pi > tau and an advantage")
    if summary.mismatch is not None:
        far = usual_mismatch is not None and summary.mismatch > usual_mismatch.limit
        note = f"mean |log-prob difference|, nats, {last}" + (f"; {usual_mismatch}" if usual_mismatch else "")
        yield Card("Mismatch", f"{summary.mismatch:.1e}", note, "warn" if far else "")
    if summary.worst_mismatch is not None:
        yield Card("Worst mismatch", f"{summary.worst_mismatch:.1e}", "of a single token in any step, nats")
    if summary.tokens_per_s is not None:
        yield Card("Tokens per second", f"{summary.tokens_per_s:,.0f}", "median of the steps")


def _samples(run: Run) -> list[dict[str, Any]]:
    """Responses of the last step that has some, as the page shows them."""
    steps = [int(as_number(row.get("step"), 0)) for row in run.samples]
    last = max(steps, default=0)
    chosen = [row for row, step in zip(run.samples, steps, strict=True) if step == last and "response" in row]
    return [_sample(row, last) for row in chosen[:_SAMPLES_SHOWN]]


def _sample(row: dict[str, Any], step: int) -> dict[str, Any]:
    """Values shown of a response: a file of another version, or a damaged one, may lack some of them."""
    reward = as_number(row.get("reward"), math.nan)
    return {
        "step": step,
        "reward": None if math.isnan(reward) else reward,
        **{key: row.get(key) for key in ("prompt", "response", "response_tokens", "finish_reason", "verifier_status")},
    }


def _changes(run: Run) -> list[tuple[int, Change]]:
    """Every setting that a resume changed, as (first step, change)."""
    return [(new.first_step, change) for old, new in pairwise(run.parts) for change in changes(old, new)]


def _configurations(run: Run) -> list[tuple[str, str]]:
    """Parts of the run, each as (its steps in words, configuration as text)."""
    if len(run.parts) < 2:
        return [("every value of this run", run.config_text)] if run.config_text else []
    ends = [f"to {part.first_step - 1:,}" for part in run.parts[1:]] + ["on"]
    return [
        (f"every value from step {part.first_step:,} {end}", yaml.safe_dump(part.config, sort_keys=False, width=100))
        for part, end in zip(run.parts, ends, strict=True)
    ]


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Every setting that is not the same in all runs, as (dotted key, value in each run); paths of the runs aside."""
    if len(runs) < 2:
        return []
    flat = [dict(flatten(run.config)) for run in runs]
    keys = {key: None for settings in flat for key in settings if key not in ("run.name", "run.output_dir")}
    rows = [(key, [str(settings.get(key, "\u2013")) for settings in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _last_metrics(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Last values of all metrics in order of name, as [(group, [(metric, last value in each run)])]."""
    names = sorted({name for run in runs for name in run.rows[-1]} - {"step"})
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for name in names:
        group, _, short = name.rpartition("/")
        groups.setdefault(group or "other", []).append((short, [_number(run.rows[-1].get(name)) for run in runs]))
    return sorted(groups.items())


def _number(value: Any) -> str:
    """Text of a metric: 4 significant digits, thousands separated; a dash where there is none."""
    if value is None:
        return "\u2013"
    if math.isnan(as_number(value, math.nan)):
        return str(value)[:_LONGEST_VALUE]
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
