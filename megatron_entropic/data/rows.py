"""Rows of parquet files, JSON lines and saved `datasets` directories; whatever is unreadable is noted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_entropic.errors import Problems, UserError

__all__ = ["Row", "RowProblems", "content_digest", "read_rows", "what_stands_there"]

_SAVED_DATASET = "state.json"
_SAVED_SPLITS = "dataset_dict.json"
_DEEPEST = 100
_JSON_ERRORS = (ValueError, RecursionError)
# pyarrow's own exceptions are ValueError, OSError, TypeError, KeyError, NotImplementedError and so on as well.
_ARROW_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    RuntimeError,
    MemoryError,
)


def read_rows(files: Iterable[Path], problems: RowProblems) -> list[Row]:
    """Read every row of the files, in order; unreadable files and lines are noted in `problems`.

    Args:
        files: parquet, JSON lines, a JSON array, or a directory that `datasets.Dataset.save_to_disk` wrote.
        problems: collects what is unreadable.
    """
    rows: list[Row] = []
    for file in files:
        before, known = len(rows), len(problems.messages) + problems.row_count
        rows.extend(_rows(file, problems))
        if len(rows) == before and len(problems.messages) + problems.row_count == known:
            problems.add(f"{file}: the file has no rows")
    return rows


def _rows(file: Path, problems: RowProblems) -> Iterator[Row]:
    if file.is_dir():
        yield from _saved_dataset_rows(file, problems)
    elif not file.is_file():
        problems.add(f"{file}: {what_stands_there(file)}")
    elif file.suffix == ".parquet":
        yield from _parquet_rows(file, problems)
    else:
        yield from _json_rows(file, problems)


def _parquet_rows(file: Path, problems: RowProblems) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Without partitioning: a folder called key=value is no column.
        table = pyarrow.parquet.read_table(file, partitioning=None)
        rows = table.to_pylist()
    except _ARROW_ERRORS as error:
        problems.add(f"{file}: not a readable parquet file: {_first_line(error)}{_content_hint(file, '.parquet')}")
        return
    for number, values in enumerate(rows):
        yield Row(file, number, values)


def _saved_dataset_rows(directory: Path, problems: RowProblems) -> Iterator[Row]:
    """Yields rows of the Arrow streams that the directory's state.json names; the library `datasets` is not needed."""
    if (directory / _SAVED_SPLITS).is_file():
        splits = sorted(path.parent.name for path in directory.glob(f"*/{_SAVED_DATASET}"))
        problems.add(f"{directory}: a data set with the splits {', '.join(splits)}: name the folder of one of them")
        return
    try:
        rows = [values for file in _saved_tables(directory) for values in _arrow_table(file).to_pylist()]
    except (*_ARROW_ERRORS, KeyError) as error:
        problems.add(f"{directory}: not a directory that datasets' save_to_disk wrote: {_first_line(error)}")
        return
    for number, values in enumerate(rows):
        yield Row(directory, number, values)


def _saved_tables(directory: Path) -> list[Path]:
    """Paths of the Arrow streams of a saved data set, in order.

    Raises:
        UserError: its rows are not in the order of its files.
        OSError, KeyError, TypeError, ValueError, RecursionError: state.json is not there, or not what datasets writes.
    """
    state = json.loads((directory / _SAVED_DATASET).read_text(encoding="utf-8"))
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError("its rows are reordered by an index file; save it after flatten_indices()")
    return [directory / str(entry["filename"]) for entry in state["_data_files"]]


def _arrow_table(file: Path) -> Any:
    import pyarrow

    with pyarrow.OSFile(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
        return reader.read_all()


def _json_rows(file: Path, problems: RowProblems) -> Iterator[Row]:
    """Yields rows of JSON lines, or of a file that is one JSON array."""
    try:
        # With a byte-order mark, as some editors put one, or without.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problems.add(f"{file}: not UTF-8 text: {error}{_content_hint(file, file.suffix)}")
        return
    except OSError as error:
        problems.add(f"{file}: cannot be read: {error.strerror}")
        return
    if text.lstrip().startswith("["):
        yield from _array_rows(file, text, problems)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = Row(file, number, {}, "line")
        try:
            values = _parsed(line)
        except _JSON_ERRORS as error:
            problems.add_row(row, "not valid JSON", _first_line(error))
            continue
        yield from _object(row, values, problems)


def _array_rows(file: Path, text: str, problems: RowProblems) -> Iterator[Row]:
    try:
        array = _parsed(text)
    except _JSON_ERRORS as error:
        problems.add(f"{file}: not a valid JSON array: {_first_line(error)}")
        return
    for number, values in enumerate(array, start=1):
        yield from _object(Row(file, number, {}, "item"), values, problems)


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Object of (key, value) pairs; a key that comes twice is refused."""
    # Nobody can know which of the two values is meant, and Python would take the last.
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = ", ".join(repr(key) for key in values if keys.count(key) > 1)
        raise UserError(f"the key {twice} comes twice in one object")
    return values


def _object(row: Row, values: Any, problems: RowProblems) -> Iterator[Row]:
    if not isinstance(values, dict):
        problems.add_row(row, f"expected a JSON object, found {type(values).__name__}")
    elif _too_deep(values):
        problems.add_row(row, "nested too deeply", f"more than {_DEEPEST} levels")
    else:
        row.values = values
        yield row


def _too_deep(value: Any) -> bool:
    """Whether pickling the value or writing it as JSON could pass Python's limit of recursion."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True


def what_stands_there(path: Path) -> str:
    """Words for why a path that is not a regular file cannot be read."""
    if path.is_dir():
        return "a folder, not a file"
    if path.is_symlink() and not path.exists():
        return f"a symbolic link that leads nowhere ({os.readlink(path)})"
    if path.is_fifo():
        return "a pipe, not a file: data are read more than once"
    return "a device or socket, not a file" if path.exists() else "no such file"


def content_digest(path: Path) -> str:
    """SHA-256 of the content that rows are read from: a file, or the Arrow files of a saved data set, in order.

    Raises:
        OSError, KeyError, TypeError, ValueError: a directory that datasets did not write.
    """
    digest = hashlib.sha256()
    for file in _saved_tables(path) if path.is_dir() else [path]:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _content_hint(file: Path, suffix: str) -> str:
    """Words for what the first bytes say that the file is, if that differs from what its name says; else empty."""
    with file.open("rb") as content:
        start = content.read(4)
    kinds = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zX": "xz"}
    for magic, kind in kinds.items():
        if start.startswith(magic):
            return f" (it is compressed: {kind}; unpack it)"
    if start == b"PAR1" and suffix != ".parquet":
        return " (it is a parquet file: call it .parquet)"
    return ""


def _first_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


# What is wrong with a data set, collected to be told in one message.

_SHOWN = 10


@dataclass(slots=True)
class Row:
    """One row with its place in a file, for messages."""

    file: Path
    number: int
    """Number of the row in the file: from 0 (parquet, Arrow), or the line or item from 1 (JSON)."""
    values: dict[str, Any]
    unit: str = "row"

    @property
    def place(self) -> str:
        """Words for where the row is, such as `train.parquet, row 17`."""
        return f"{self.file}, {self.unit} {self.number}"


class RowProblems(Problems):
    """Files that cannot be read at all, and rows that cannot be used, the latter grouped by reason."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[tuple[Path, str, str], list[tuple[int, str]]] = {}

    def add_row(self, row: Row, reason: str, detail: str = "") -> None:
        """Note a row; `detail` is what differs between rows with the same reason."""
        self._rows.setdefault((row.file, row.unit, reason), []).append((row.number, detail))

    @property
    def row_count(self) -> int:
        """Number of findings about rows; a row may have several."""
        return sum(map(len, self._rows.values()))

    def row_lines(self, shown: int = _SHOWN) -> list[str]:
        """Lines about rows, one for each file and reason, with the numbers of the first rows."""
        return [_line(file, unit, reason, found, shown) for (file, unit, reason), found in self._rows.items()]

    def raise_if_any(self, headline: str, *, skip_rows: bool = False) -> None:
        """Raise everything that was noted as one error.

        Args:
            headline: first words of the message.
            skip_rows: whether findings about rows alone are no error.

        Raises:
            UserError: files first, then each reason with its rows.
        """
        if not self.messages and (skip_rows or not self._rows):
            return
        count = len(self.messages) + self.row_count
        shown = [*self.messages[:_SHOWN], *self.row_lines()]
        more = len(self.messages) - _SHOWN
        tail = f"\n  ... and {more} more files or benchmarks" if more > 0 else ""
        raise UserError(f"{headline}: {count} problem(s)\n" + "\n".join(f"  - {line}" for line in shown) + tail)


def _line(file: Path, unit: str, reason: str, found: list[tuple[int, str]], shown: int) -> str:
    """Line such as `train.parquet: 3 rows: the ground truth is empty: rows 5, 9, 12`."""
    numbers = [f"{number} ({detail})" if detail else str(number) for number, detail in found[:shown]]
    if len(found) == 1:
        number, detail = found[0]
        return f"{file}, {unit} {number}: {reason}" + (f": {detail}" if detail else "")
    more = f" and {len(found) - shown:,} more" if len(found) > shown else ""
    return f"{file}: {len(found):,} {unit}s: {reason}: {unit}s {', '.join(numbers)}{more}"
