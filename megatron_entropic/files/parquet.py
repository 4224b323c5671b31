"""Parquet files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def write_parquet(path: Path, table: Any) -> None:
    """Write a pyarrow table, durably: the file appears when it is complete, with the folders above it.

    Raises:
        OSError: the disk refuses; the message names the file.
    """
    import pyarrow.parquet

    unfinished = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            pyarrow.parquet.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write to {path}: {error.strerror}") from error
    os.replace(unfinished, path)
