"""An evaluation on disk.

directory/
    NAME.parquet         every response to one benchmark, see `generations`
    evaluation.json      label, benchmarks in order, all numbers
    table.md             the same for people
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_entropic.errors import UserError
from megatron_entropic.evaluation.generations import read_generations
from megatron_entropic.evaluation.summary import BenchmarkSummary, Problem, problems_of, summarise
from megatron_entropic.files.atomic import write_text
from megatron_entropic.files.formats import EVALUATION, NewerFormat

SUMMARY_FILE = "evaluation.json"
TABLE_FILE = "table.md"


@dataclass(frozen=True)
class StoredEvaluation:
    """A finished evaluation, read back."""

    path: Path
    label: str
    problems: dict[str, list[Problem]]
    """Problems of each benchmark, by its name."""
    summaries: list[BenchmarkSummary]


def generations_path(directory: Path, benchmark: str) -> Path:
    """Path of the responses to a benchmark."""
    return directory / f"{benchmark}.parquet"


def is_evaluation(directory: Path) -> bool:
    """Whether a directory holds a finished evaluation."""
    return (directory / SUMMARY_FILE).is_file()


def stored_settings(directory: Path, benchmark: str) -> dict[str, Any] | None:
    """The settings of a benchmark's stored responses; None if there are none.

    Raises:
        UserError: there is something else in the place of the file.
    """
    path = generations_path(directory, benchmark)
    return read_generations(path)[1] if path.exists() else None


def summarise_stored(directory: Path, benchmark: str) -> tuple[list[Problem], BenchmarkSummary]:
    """Problems and numbers of one benchmark, computed from its stored responses."""
    generations, settings = read_generations(generations_path(directory, benchmark))
    problems = problems_of(generations)
    return problems, summarise(benchmark, problems, greedy=settings["sampling"]["temperature"] == 0)


def write_summary(directory: Path, label: str, summaries: Sequence[BenchmarkSummary]) -> None:
    """Write evaluation.json and table.md; the evaluation counts as finished from then on."""
    ordered = in_paper_order(summaries)
    content = {
        "label": label,
        "benchmarks": [asdict(summary) for summary in ordered],
        "overall": {
            "average": overall([summary.average.value for summary in ordered]),
            "pass": overall([summary.pass_at[summary.samples].value for summary in ordered]),
        },
    }
    (directory / TABLE_FILE).write_text(markdown(label, summaries), encoding="utf-8")
    write_text(directory / SUMMARY_FILE, json.dumps(EVALUATION.stamp(content), indent=1) + "\n")


def load_evaluation(directory: Path) -> StoredEvaluation:
    """Read a finished evaluation; the numbers are computed again from the responses.

    Raises:
        UserError: no finished evaluation there, damaged files, or files of a later version of the package.
    """
    path = directory / SUMMARY_FILE
    try:
        content = EVALUATION.read(json.loads(path.read_text(encoding="utf-8")), path)
        label, names = content["label"], [benchmark["name"] for benchmark in content["benchmarks"]]
    except NewerFormat:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory}: no finished evaluation there ({error})") from error
    found = {name: summarise_stored(directory, name) for name in names}
    return StoredEvaluation(
        directory, label, {name: problems for name, (problems, _) in found.items()}, [s for _, s in found.values()]
    )


# The table of an evaluation, its columns in the order of the paper's tables (arXiv 2511.15248).

# Both of the paper's tables in one order: Qwen3-8B-Base has Omni-math, Nemotron-1.5B the four after it.
_PAPER_ORDER = ("math", "amc", "aime24", "aime25", "olympi", "omni", "minerva", "hmmt", "brumo", "cmimc")


def in_paper_order(summaries: Sequence[BenchmarkSummary]) -> list[BenchmarkSummary]:
    """Summaries in the order of the paper's tables; other benchmarks behind them, as given."""
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
