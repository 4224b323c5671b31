"""What became of the rows of the training files: what was skipped, dropped, found twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_entropic.config.run import DataConfig
from megatron_entropic.data.filters import Duplicates, Overlap
from megatron_entropic.data.problems import Problems

_SHOWN = 5


@dataclass
class DataReport:
    """Counts and places, for the screen and for data_report.txt."""

    rows: dict[Path, int] = field(default_factory=dict)
    """Read from each file."""
    kept: int = 0
    """Prompts of the run."""
    skipped: int = 0
    """Findings about malformed rows (`data.skip_malformed`)."""
    skipped_lines: list[str] = field(default_factory=list)
    too_long: list[tuple[str, int]] = field(default_factory=list)
    """(place, tokens) of prompts over the limit."""
    pass_rates: tuple[int, int] | None = None
    """Prompts with a recorded rate, and those of them that were left out."""
    unknown: list[str] = field(default_factory=list)
    """Places of prompts of which the tokenizer does not know a part."""
    left_off: str = ""
    """What the tokenizer puts behind every text, which is left off prompts."""
    pass_rates_because: str = ""
    """Why prompts have none, where the file says so."""
    copies: list[str] = field(default_factory=list)
    """Findings about duplicates and benchmark problems."""

    def note_skipped(self, problems: Problems) -> None:
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
        """The whole report."""
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
