"""The results of a study as rows: one for each step of each run, with what tells the runs apart beside the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet

Results = list[dict[str, Any]]
"""Rows; which columns there are is the study's own affair."""
Key = TypeVar("Key")


def load_results(path: Path) -> Results:
    """The rows of a study's results.parquet."""
    rows: Results = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def grouped(results: Results, key_type: type[Key]) -> dict[Key, Results]:
    """The rows of each run, by step; `key_type` is a dataclass whose fields are the columns that name a run."""
    names = [field.name for field in fields(key_type)]  # type: ignore[arg-type]
    runs: dict[Key, Results] = {}
    for row in results:
        runs.setdefault(key_type(**{name: row[name] for name in names}), []).append(row)
    return {key: sorted(rows, key=lambda row: row["step"]) for key, rows in runs.items()}


def series(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A metric of some rows; NaN where it is missing."""
    return [math.nan if row.get(name) is None else float(row[name]) for row in rows]
