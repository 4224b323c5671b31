"""Parquet files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def write_parquet(path: Path, table: Any) -> None:
    """Write a pyarrow table, durably: the file appears when it is complete, with the folders above it."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        pyarrow.parquet.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
