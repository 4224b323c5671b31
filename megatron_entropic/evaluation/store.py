"""An evaluation on disk.

directory/
    NAME.parquet         every response to one benchmark, see `generations`
    evaluation.json      label, benchmarks in order, all numbers
    table.md             the same for people
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_entropic.errors import UserError
from megatron_entropic.evaluation.generations import read_generations
from megatron_entropic.evaluation.summary import BenchmarkSummary, Problem, problems_of, summarise
from megatron_entropic.evaluation.table import in_paper_order, markdown, overall
from megatron_entropic.files.formats import EVALUATION, NewerFormat

SUMMARY_FILE = "evaluation.json"
TABLE_FILE = "table.md"


@dataclass(frozen=True)
class StoredEvaluation:
    """A finished evaluation, read back."""

    path: Path
    label: str
    problems: dict[str, list[Problem]]
    """By benchmark."""
    summaries: list[BenchmarkSummary]


def generations_path(directory: Path, benchmark: str) -> Path:
    """Where the responses to a benchmark are kept."""
    return directory / f"{benchmark}.parquet"


def is_evaluation(directory: Path) -> bool:
    """Whether a finished evaluation is kept there."""
    return (directory / SUMMARY_FILE).is_file()


def stored_settings(directory: Path, benchmark: str) -> dict[str, Any] | None:
    """The settings of a benchmark's stored responses; None if there are none.

    Raises:
        UserError: there is something else in the place of the file.
    """
    path = generations_path(directory, benchmark)
    return read_generations(path)[1] if path.exists() else None


def summarise_stored(directory: Path, benchmark: str) -> tuple[list[Problem], BenchmarkSummary]:
    """One benchmark from its stored responses."""
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
    unfinished = directory / f"{SUMMARY_FILE}.unfinished"
    unfinished.write_text(json.dumps(EVALUATION.stamp(content), indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, directory / SUMMARY_FILE)


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
