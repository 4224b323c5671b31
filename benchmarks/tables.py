"""Trials as Markdown, as JSON and as a figure."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.contenders import FUSED_GRADIENT, FUSED_RECOMPUTE, HEAD_OURS, HEAD_TEXTBOOK, TEXTBOOK
from benchmarks.machine import cpu_model
from benchmarks.markdown import markdown_table
from benchmarks.measure import Seconds
from benchmarks.problems import Case
from benchmarks.trials import Trial

Column = tuple[str, Callable[[Trial], str]]
MIB = 2**20
COLOURS = {HEAD_TEXTBOOK: "#697386", HEAD_OURS: "#e0702e", FUSED_RECOMPUTE: "#3461d1", FUSED_GRADIENT: "#1f9d74"}
PACKAGES = ("torch", "triton", "megatron-core", "liger-kernel")


def write_report(trials: Sequence[Trial], notes: Sequence[str], folder: Path) -> list[Path]:
    """Writes `vocab_parallel.md`, `.json` and `vocab_parallel_memory.png`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, records, figure = (folder / f"vocab_parallel{end}" for end in (".md", ".json", "_memory.png"))
    markdown.write_text(report(trials, notes), encoding="utf-8")
    records.write_text(json.dumps([asdict(trial) for trial in trials], indent=1) + "\n", encoding="utf-8")
    _draw_memory([trial for trial in trials if trial.case.hidden is not None and trial.case.ranks == 1], figure)
    return [markdown, records, figure]


def report(trials: Sequence[Trial], notes: Sequence[str]) -> str:
    """The Markdown page."""
    given = [trial for trial in trials if trial.case.hidden is None]
    heads = [trial for trial in trials if trial.case.hidden is not None]
    faster = Ratios(given, TEXTBOOK)
    parts = [
        "# Log-probability and entropy over a sharded vocabulary",
        f"{cpu_model()}, {os.cpu_count()} cores, one thread per process; {environment()}.",
        "## Given logits: time",
        "CPU time of one rank (user and system), medians. `x` columns: how many times faster than the textbook path. "
        '"Pages kept": freed memory stays with the process, so that no time goes into mapping new pages.',
        table(
            [trial for trial in given if trial.total],
            [
                *LOGITS_COLUMNS,
                ("forward, ms", lambda trial: _milliseconds(trial.forward, "cpu")),
                ("both, ms", lambda trial: _milliseconds(trial.total, "cpu")),
                ("both, wall ms", lambda trial: _milliseconds(trial.total, "wall")),
                ("x forward", lambda trial: faster("forward", "cpu", trial)),
                ("x both", lambda trial: faster("total", "cpu", trial)),
                ("x both, wall", lambda trial: faster("total", "wall", trial)),
            ],
        ),
        "## Given logits: memory, communication, errors",
        "Memory: highest sum of all tensors beside the logits, gradient included, in shards of the logits. Bytes: sent "
        "by each rank, per token. Errors: largest difference from float64, in the gradient relative to its largest "
        "element.",
        table(given, [*LOGITS_COLUMNS, *_shared_columns(), *ERROR_COLUMNS]),
        "## Output layer included",
        "Products of the output layer forward and backward included. `t` columns: time relative to "
        f'"{HEAD_OURS}". "Beside gradients" is the memory without dL/dhidden and dL/dweight, which all return.',
        table(heads, _head_columns(heads)),
    ]
    return "\n\n".join([*parts, *(f"Not measured: {note}." for note in notes)]) + "\n"


def environment() -> str:
    """Date and versions."""
    versions = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    return ", ".join([f"{datetime.date.today():%Y-%m-%d}", f"Python {platform.python_version()}", *versions])


def table(trials: Iterable[Trial], columns: Sequence[Column]) -> str:
    """A Markdown table, one row for each trial."""
    rows = ([show(trial) for _, show in columns] for trial in trials)
    return markdown_table([name for name, _ in columns], rows)


class Ratios:
    """Medians of one contender relative to those of the others in the same case."""

    def __init__(self, trials: Sequence[Trial], reference: str) -> None:
        self._reference = {trial.case: trial for trial in trials if trial.contender == reference}

    def value(self, stage: str, clock: str, trial: Trial) -> float | None:
        """The reference's time / the trial's; None if one was not timed."""
        reference = self._reference.get(trial.case)
        own, other = getattr(trial, stage), getattr(reference, stage, None)
        return None if own is None or other is None else getattr(other, clock) / getattr(own, clock)

    def __call__(self, stage: str, clock: str, trial: Trial) -> str:
        """How many times faster than the reference."""
        value = self.value(stage, clock, trial)
        return "" if value is None else f"{value:.2f}"

    def inverse(self, stage: str, clock: str, trial: Trial) -> str:
        """Time as a multiple of the reference's."""
        value = self.value(stage, clock, trial)
        return "" if value is None else f"{1 / value:.2f}"


def _shape(case: Case) -> str:
    shape = f"{case.tokens} x {case.vocab} {case.dtype.replace('float32', 'fp32').replace('bfloat16', 'bf16')}"
    shape += f", logits + {case.offset:g}" if case.offset else ""
    return f"{shape}, pages kept" if case.pages_kept else shape


LOGITS_COLUMNS: list[Column] = [
    ("T x V", lambda trial: _shape(trial.case)),
    ("TP", lambda trial: str(trial.case.ranks)),
    ("entropy", lambda trial: "differentiated" if trial.case.entropy_gradient else "value only"),
    ("contender", lambda trial: trial.contender),
]
ERROR_COLUMNS: list[Column] = [
    (name, lambda trial, name=name: "" if trial.errors is None else f"{getattr(trial.errors, name):.1e}")  # type: ignore[misc]
    for name in ("logprob", "entropy", "gradient")
]


def _shared_columns() -> list[Column]:
    return [
        ("memory, shards", lambda trial: f"{trial.shards:.3f}"),
        ("collectives fwd / bwd", lambda trial: " / ".join(map(str, trial.collectives))),
        ("bytes fwd / bwd", lambda trial: " / ".join(f"{sent / trial.case.tokens:g}" for sent in trial.sent_bytes)),
    ]


def _head_columns(heads: Sequence[Trial]) -> list[Column]:
    slower = Ratios(heads, HEAD_OURS)
    smallest = {trial.case: trial for trial in heads if trial.contender == HEAD_TEXTBOOK}
    return [
        ("T x V, H", lambda trial: f"{_shape(trial.case)}, {trial.case.hidden}"),
        ("TP", lambda trial: str(trial.case.ranks)),
        ("contender", lambda trial: trial.contender),
        ("both, ms", lambda trial: _milliseconds(trial.total, "cpu")),
        ("t", lambda trial: slower.inverse("total", "cpu", trial)),
        ("t, wall", lambda trial: slower.inverse("total", "wall", trial)),
        ("memory, MiB", lambda trial: f"{trial.peak_bytes / MIB:.0f}"),
        ("beside gradients, MiB", lambda trial: f"{(trial.peak_bytes - trial.case.gradient_bytes) / MIB:.1f}"),
        ("memory, textbook / this", lambda trial: _times_smaller(smallest.get(trial.case), trial)),
        *_shared_columns()[1:],
        *ERROR_COLUMNS,
    ]


def _times_smaller(reference: Trial | None, trial: Trial) -> str:
    return "" if reference is None else f"{reference.peak_bytes / trial.peak_bytes:.1f}"


def _milliseconds(taken: Seconds | None, clock: str) -> str:
    return "" if taken is None else f"{1e3 * getattr(taken, clock):.0f}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _draw_memory(heads: Sequence[Trial], path: Path) -> None:
    """Peak memory of each contender against the number of tokens."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, colour in COLOURS.items():
        points = sorted(
            {trial.case.tokens: trial.peak_bytes / MIB for trial in heads if trial.contender == name}.items()
        )
        if points:
            style = "--" if name == FUSED_GRADIENT else "-"
            axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens in a micro-batch")
    axes.set_ylabel("peak memory beside the inputs, MiB")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    tokens = sorted({trial.case.tokens for trial in heads})
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.grid(color="#e6e9ef", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if tokens:
        case = heads[0].case
        axes.set_title(
            f"Output layer, log-probability, entropy and gradients (V {case.vocab}, H {case.hidden}, fp32)", fontsize=10
        )
        axes.legend(frameon=False)
    canvas.print_png(path)
