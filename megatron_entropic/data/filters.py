"""Problems that come twice, and training problems that are also in a benchmark.

Two problems are equal if their texts are after normalisation: Unicode NFKC, lower case, white space as one space. They
overlap if they share n words in a row; words that more than ten training problems share are boilerplate, which does not
count.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_entropic.config.run import DataConfig
from megatron_entropic.data.rows import RowProblems
from megatron_entropic.errors import UserError
from megatron_entropic.files.formats import EVALUATION, NewerFormat

_WORD = re.compile(r"\w+")
_COMMON_ROWS = 10


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Positions of problems that equal an earlier one."""

    positions: list[int]
    contradictions: list[int]
    """Positions of those whose ground truth is not that of the earlier one."""


@dataclass(slots=True)
class Overlap:
    """Positions of training problems that a benchmark has too."""

    exact: list[int] = field(default_factory=list)
    ngram: list[int] = field(default_factory=list)
    """Positions of problems that share n words in a row with one of the benchmark's, without the equal ones."""

    @property
    def positions(self) -> set[int]:
        """Positions of all equal and overlapping problems."""
        return {*self.exact, *self.ngram}


def normalised(text: str) -> str:
    """The text after normalisation, which is the same for two problems that count as equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def find_duplicates(texts: Sequence[str], truths: Sequence[Any]) -> Duplicates:
    """Find later copies of earlier problems."""
    first: dict[str, int] = {}
    found = Duplicates([], [])
    for position, text in enumerate(texts):
        earlier = first.setdefault(normalised(text), position)
        if earlier != position:
            found.positions.append(position)
            if str(truths[position]).strip() != str(truths[earlier]).strip():
                found.contradictions.append(position)
    return found


def find_overlap(texts: Sequence[str], benchmarks: Mapping[str, Sequence[str]], words: int) -> dict[str, Overlap]:
    """Find the training problems that each benchmark has too.

    Args:
        texts: training problems.
        benchmarks: problems of each benchmark.
        words: n of the n-grams. Shorter problems can only be equal.
    """
    equal = {name: {normalised(problem) for problem in problems} for name, problems in benchmarks.items()}
    grams = {
        name: set().union(*(ngrams(problem, words) for problem in problems)) for name, problems in benchmarks.items()
    }
    wanted = set().union(*grams.values())
    shared = [ngrams(text, words) & wanted for text in texts]
    counts = Counter(gram for row in shared for gram in row)
    telling = {gram for gram, count in counts.items() if count <= _COMMON_ROWS}
    found = {name: Overlap() for name in benchmarks}
    for position, text in enumerate(texts):
        plain = normalised(text)
        for name, overlap in found.items():
            if plain in equal[name]:
                overlap.exact.append(position)
            elif not telling.isdisjoint(shared[position] & grams[name]):
                overlap.ngram.append(position)
    return found


def ngrams(text: str, words: int) -> set[int]:
    """Hashes of every `words` words in a row; they can be compared within one process only."""
    found = _WORD.findall(normalised(text))
    return {hash(tuple(found[start : start + words])) for start in range(len(found) - words + 1)}


# Recorded pass rates of problems, from the responses that `megatron-entropic evaluate` stored.

_COLUMNS = ["prompt", "reward"]
_SETTINGS_KEY = b"megatron_entropic.evaluation"
_FORM_KEYS = ("system_prompt", "prompt_suffix", "apply_chat_template", "template_date")


def recorded_form(file: Path) -> dict[str, Any]:
    """Read how the prompts of an evaluation were made: `data` keys, and the SHA-256 of the chat template.

    Raises:
        UserError: no such file, not one of an evaluation, or of a later version of the package.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        settings = EVALUATION.read(json.loads((pyarrow.parquet.read_schema(file).metadata or {})[_SETTINGS_KEY]), file)
        data = settings["data"]
        form = {f"data.{key}": data[key] for key in _FORM_KEYS if key in data}
    except NewerFormat:
        raise
    except (pyarrow.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not the stored responses of an evaluation: {error}") from error
    return form | {"the chat template": settings.get("chat_template_sha256")}


def read_pass_rates(file: Path) -> dict[str, float]:
    """Read the share of responses with a positive reward, by rendered prompt.

    Args:
        file: NAME.parquet of an evaluation whose benchmark was the training file.

    Raises:
        UserError: no such file, or not one of an evaluation.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(file, columns=_COLUMNS).to_pydict()
    except (pyarrow.ArrowException, OSError, LookupError, ValueError) as error:
        raise UserError(f"{file}: not the stored responses of an evaluation: {error}") from error
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for prompt, reward in zip(columns["prompt"], columns["reward"], strict=True):
        outcomes[prompt].append(reward > 0)
    return {prompt: fmean(solved) for prompt, solved in outcomes.items()}


# What became of the rows of the training files: what was skipped, dropped, found twice.

_SHOWN = 5


@dataclass
class DataReport:
    """Counts and places, for the screen and for data_report.txt."""

    rows: dict[Path, int] = field(default_factory=dict)
    """Number of rows read from each file."""
    kept: int = 0
    """Number of prompts of the run."""
    skipped: int = 0
    """Number of findings about malformed rows (`data.skip_malformed`)."""
    skipped_lines: list[str] = field(default_factory=list)
    too_long: list[tuple[str, int]] = field(default_factory=list)
    """Prompts over the limit, as (place, tokens)."""
    pass_rates: tuple[int, int] | None = None
    """Number of prompts with a recorded rate, and of those among them that were left out."""
    unknown: list[str] = field(default_factory=list)
    """Places of prompts of which the tokenizer does not know a part."""
    left_off: str = ""
    """Text that the tokenizer puts behind every text, which is left off prompts."""
    pass_rates_because: str = ""
    """Words for why prompts have no recorded rate, where the file says so."""
    copies: list[str] = field(default_factory=list)
    """Findings about duplicates and benchmark problems."""

    def note_skipped(self, problems: RowProblems) -> None:
        """Remember the malformed rows that are skipped."""
        self.skipped = problems.row_count
        self.skipped_lines = problems.row_lines()

    def note_copies(
        self, config: DataConfig, places: list[str], duplicates: Duplicates, overlaps: Mapping[str, Overlap]
    ) -> None:
        """Remember copies and benchmark problems."""
        dropped = " (dropped)" if config.duplicates == "drop" else " (kept: data.duplicates)"
        if duplicates.positions:
            contradictions = len(duplicates.contradictions)
            other = f", {contradictions:,} of them with another ground truth" if contradictions else ""
            self.copies.append(
                f"{len(duplicates.positions):,} copies of earlier problems{other}{dropped}: "
                + _some([places[position] for position in duplicates.positions])
            )
        dropped = " (dropped)" if config.benchmark_overlap == "drop" else " (kept: data.benchmark_overlap)"
        for name, overlap in overlaps.items():
            if overlap.positions:
                self.copies.append(
                    f"benchmark {name}: {len(overlap.exact):,} training problems are in it, {len(overlap.ngram):,} "
                    f"more share {config.overlap_words} words in a row with one of it{dropped}: "
                    + _some([places[position] for position in sorted(overlap.positions)])
                )

    def lines(self) -> list[str]:
        """Lines of the whole report."""
        return list(self._lines())

    def _lines(self) -> Iterator[str]:
        for file, count in self.rows.items():
            yield f"{file}: {count:,} rows"
        if self.skipped:
            yield f"skipped as malformed: {self.skipped:,} findings"
            yield from (f"  {line}" for line in self.skipped_lines)
        if self.too_long:
            longest = max(tokens for _, tokens in self.too_long)
            yield (
                f"dropped as longer than data.max_prompt_tokens: {len(self.too_long):,} (the longest has {longest:,} "
                "tokens): " + _some([f"{place} ({tokens:,})" for place, tokens in self.too_long])
            )
        if self.unknown:
            yield (
                f"{len(self.unknown):,} prompts have characters unknown to the tokenizer, which the model cannot "
                "see: " + _some(self.unknown)
            )
        if self.left_off:
            yield f"the tokenizer appends {self.left_off!r} to every text: left off, for nothing could follow it"
        yield from self.copies
        if self.pass_rates is not None:
            known, outside = self.pass_rates
            yield (
                f"recorded pass rates: {known:,} prompts, {outside:,} of them outside the limits and left out"
                + self.pass_rates_because
            )
        yield f"prompts of the run: {self.kept:,}"


def _some(places: list[str]) -> str:
    more = f" and {len(places) - _SHOWN:,} more" if len(places) > _SHOWN else ""
    return ", ".join(places[:_SHOWN]) + more
