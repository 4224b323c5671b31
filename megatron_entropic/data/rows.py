"""Rows of parquet and JSON-lines files as dictionaries; whatever is unreadable comes in one error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SHOWN = 10


@dataclass(slots=True)
class Row:
    """One row and where it stands, for messages."""

    file: Path
    number: int
    """Row of the file from 0 (parquet), or line from 1 (JSON lines)."""
    values: dict[str, Any]

    @property
    def place(self) -> str:
        """`train.parquet, row 17`."""
        unit = "row" if self.file.suffix == ".parquet" else "line"
        return f"{self.file}, {unit} {self.number}"


@dataclass(slots=True)
class Problems:
    """Collects what is wrong with a data set, to be raised together."""

    messages: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        """Note one problem."""
        self.messages.append(message)

    def raise_if_any(self, what: str) -> None:
        """Raise what was noted.

        Raises:
            ValueError: the first problems in full and the number of the others.
        """
        if not self.messages:
            return
        shown = "\n".join(f"  - {message}" for message in self.messages[:_SHOWN])
        more = len(self.messages) - _SHOWN
        tail = f"\n  ... and {more} more like these" if more > 0 else ""
        raise ValueError(f"{what}: {len(self.messages)} problem(s)\n{shown}{tail}")


def read_rows(files: Iterable[Path], problems: Problems) -> list[Row]:
    """Every row of the files, in order; unreadable files and lines are noted in `problems`."""
    rows: list[Row] = []
    for file in files:
        if not file.is_file():
            problems.add(f"{file}: no such file")
            continue
        read = _parquet_rows if file.suffix == ".parquet" else _json_rows
        before, known = len(rows), len(problems.messages)
        rows.extend(read(file, problems))
        if len(rows) == before and len(problems.messages) == known:
            problems.add(f"{file}: the file has no rows")
    return rows


def _parquet_rows(file: Path, problems: Problems) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(f"{file}: not a readable parquet file: {error}")
        return
    for number, values in enumerate(table.to_pylist()):
        yield Row(file, number, values)


def _json_rows(file: Path, problems: Problems) -> Iterator[Row]:
    """JSON lines; a file that is one JSON array is taken too."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        problems.add(f"{file}: not UTF-8 text: {error}")
        return
    if text.lstrip().startswith("["):
        yield from _array_rows(file, text, problems)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            problems.add(f"{file}, line {number}: not valid JSON: {error}")
            continue
        if isinstance(values, dict):
            yield Row(file, number, values)
        else:
            problems.add(f"{file}, line {number}: expected a JSON object, found {type(values).__name__}")


def _array_rows(file: Path, text: str, problems: Problems) -> Iterator[Row]:
    try:
        array = json.loads(text)
    except ValueError as error:
        problems.add(f"{file}: not a valid JSON array: {error}")
        return
    for number, values in enumerate(array, start=1):
        if isinstance(values, dict):
            yield Row(file, number, values)
        else:
            problems.add(f"{file}, item {number}: expected a JSON object, found {type(values).__name__}")
