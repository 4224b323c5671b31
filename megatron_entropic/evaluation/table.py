"""The table of an evaluation, its columns in the order of the paper's tables (arXiv 2511.15248)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from megatron_entropic.evaluation.summary import BenchmarkSummary

# Both of the paper's tables in one order: Qwen3-8B-Base has Omni-math, Nemotron-1.5B the four after it.
_PAPER_ORDER = ("math", "amc", "aime24", "aime25", "olympi", "omni", "minerva", "hmmt", "brumo", "cmimc")


def in_paper_order(summaries: Sequence[BenchmarkSummary]) -> list[BenchmarkSummary]:
    """The paper's benchmarks as its tables have them, others behind them as given."""
    return sorted(summaries, key=lambda summary: _place(summary.name))


def overall(values: Sequence[float]) -> float:
    """The paper's Overall: the mean over benchmarks, each with the same weight whatever its number of problems."""
    return fmean(values)


def markdown(label: str, summaries: Sequence[BenchmarkSummary]) -> str:
    """Two tables: avg@N / pass@N in per cent as the paper prints them, and everything else a benchmark a row."""
    ordered = in_paper_order(summaries)
    averages = [summary.average.value for summary in ordered]
    passes = [summary.pass_at[summary.samples].value for summary in ordered]
    header = ["Model", *(f"{summary.name} ({summary.samples})" for summary in ordered), "Overall"]
    pairs = [*zip(averages, passes, strict=True), (overall(averages), overall(passes))]
    lines = [
        "avg@N / pass@N in per cent, N in brackets",
        "",
        *_rows([header, [label, *(f"{_percent(average)} / {_percent(passed)}" for average, passed in pairs)]]),
        "",
        "Intervals: 95 %, bootstrap over problems. Entropy: mean of -log p of the sampled tokens, nats.",
        "",
        *_rows([_DETAILS, *(_details(summary) for summary in ordered)]),
    ]
    return "\n".join(lines) + "\n"


_DETAILS = [
    "benchmark",
    "problems",
    "N",
    "avg@N",
    "95 %",
    "pass@N",
    "95 %",
    "maj@N",
    "tokens",
    "cut off",
    "entropy",
    "timeouts",
    "errors",
]


def _details(summary: BenchmarkSummary) -> list[str]:
    best = summary.pass_at[summary.samples]
    return [
        summary.name,
        str(summary.problems),
        str(summary.samples),
        _percent(summary.average.value),
        f"{_percent(summary.average.low)} to {_percent(summary.average.high)}",
        _percent(best.value),
        f"{_percent(best.low)} to {_percent(best.high)}",
        "-" if summary.majority is None else _percent(summary.majority.value),
        f"{summary.mean_tokens:.0f}",
        f"{_percent(summary.truncated)} %",
        "-" if summary.sampled_entropy is None else f"{summary.sampled_entropy:.3f}",
        str(summary.verifier_timeouts),
        str(summary.verifier_errors),
    ]


def _rows(cells: list[list[str]]) -> list[str]:
    header, *rows = [f"| {' | '.join(row)} |" for row in cells]
    return [header, f"|{'|'.join(['---'] * len(cells[0]))}|", *rows]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _place(name: str) -> int:
    plain = "".join(character for character in name.lower() if character.isalnum())
    return next((place for place, start in enumerate(_PAPER_ORDER) if plain.startswith(start)), len(_PAPER_ORDER))
