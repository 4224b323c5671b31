"""Rows of parquet files, JSON lines and saved `datasets` directories; whatever is unreadable is noted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_entropic.data.problems import Problems, Row
from megatron_entropic.errors import UserError

__all__ = ["Problems", "Row", "read_rows"]

_SAVED_DATASET = "state.json"
_SAVED_SPLITS = "dataset_dict.json"


def read_rows(files: Iterable[Path], problems: Problems) -> list[Row]:
    """Every row of the files, in order; unreadable files and lines are noted in `problems`.

    Args:
        files: parquet, JSON lines, a JSON array, or a directory that `datasets.Dataset.save_to_disk` wrote.
    """
    rows: list[Row] = []
    for file in files:
        before, known = len(rows), len(problems.messages) + problems.row_count
        rows.extend(_rows(file, problems))
        if len(rows) == before and len(problems.messages) + problems.row_count == known:
            problems.add(f"{file}: the file has no rows")
    return rows


def _rows(file: Path, problems: Problems) -> Iterator[Row]:
    if file.is_dir():
        yield from _saved_dataset_rows(file, problems)
    elif not file.is_file():
        problems.add(f"{file}: no such file")
    elif file.suffix == ".parquet":
        yield from _parquet_rows(file, problems)
    else:
        yield from _json_rows(file, problems)


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


def _saved_dataset_rows(directory: Path, problems: Problems) -> Iterator[Row]:
    """The Arrow streams that the directory's state.json names; the library `datasets` is not needed for that."""
    import pyarrow

    if (directory / _SAVED_SPLITS).is_file():
        splits = sorted(path.parent.name for path in directory.glob(f"*/{_SAVED_DATASET}"))
        problems.add(f"{directory}: a data set with the splits {', '.join(splits)}: name the folder of one of them")
        return
    try:
        state = json.loads((directory / _SAVED_DATASET).read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise UserError("its rows are reordered by an index file; save it after flatten_indices()")
        tables = [_arrow_table(directory / name) for name in names]
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        problems.add(f"{directory}: not a directory that datasets' save_to_disk wrote: {error}")
        return
    number = 0
    for table in tables:
        for values in table.to_pylist():
            yield Row(directory, number, values)
            number += 1


def _arrow_table(file: Path) -> Any:
    import pyarrow

    with pyarrow.OSFile(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
        return reader.read_all()


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
        row = Row(file, number, {}, "line")
        try:
            values = json.loads(line)
        except ValueError as error:
            problems.add_row(row, "not valid JSON", str(error))
            continue
        yield from _object(row, values, problems)


def _array_rows(file: Path, text: str, problems: Problems) -> Iterator[Row]:
    try:
        array = json.loads(text)
    except ValueError as error:
        problems.add(f"{file}: not a valid JSON array: {error}")
        return
    for number, values in enumerate(array, start=1):
        yield from _object(Row(file, number, {}, "item"), values, problems)


def _object(row: Row, values: Any, problems: Problems) -> Iterator[Row]:
    if isinstance(values, dict):
        row.values = values
        yield row
    else:
        problems.add_row(row, f"expected a JSON object, found {type(values).__name__}")
