"""Files and directories that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

from megatron_entropic.files.paths import make_directory

SPACE_MARGIN_BYTES = 16 * 2**20
"""Bytes of free space asked for beyond the tensors: headers, metadata, tokenizer."""


@contextmanager
def appears_when_complete(output_dir: Path) -> Iterator[Path]:
    """Yields a hidden sibling of `output_dir`, flushed and renamed to it if the body succeeds, removed if it does not.

    An existing `output_dir` steps aside as `.NAME.replaced` until the new one is in place. What an interrupted process
    left behind is removed at the next start.
    """
    make_directory(output_dir.parent)
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    replaced = output_dir.with_name(f".{output_dir.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        if output_dir.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            output_dir.rename(replaced)
        partial.rename(output_dir)
        sync(output_dir.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def output_problems(output_dir: Path, needed_bytes: int) -> list[str]:
    """Reasons why a new directory of that size cannot be written there; empty if nothing speaks against it."""
    problems = []
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        problems.append(f"{output_dir}: exists and is not empty; nothing is written over it")
    parent = next(path for path in output_dir.absolute().parents if path.exists())
    if not parent.is_dir():
        return [*problems, f"{output_dir}: {parent} is a file"]
    free = shutil.disk_usage(parent).free
    # What an interrupted conversion left is removed first.
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    free += sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
    needed = needed_bytes + SPACE_MARGIN_BYTES
    if free < needed:
        problems.append(
            f"{output_dir}: {needed / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free on that disk"
        )
    return problems


def sync(path: Path) -> None:
    """fsync a file or a directory (which makes the names in it durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Yields a file that appears in place of `path` when the block succeeds, with the folders above it.

    Args:
        durable: whether the file is on the disk by then, not only in the system's memory.

    Raises:
        OSError: the disk refuses; the message names the file, and what was there before is still there.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        make_directory(path.parent)
        with unfinished.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write to {path}: {error.strerror}") from error


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text by `atomic_write`; half characters, which models can produce, are written as escapes."""
    with atomic_write(path, durable=durable) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def write_parquet(path: Path, tables: Iterable[Any]) -> None:
    """Write pyarrow tables of one schema, at least one, as the row groups of a file, by `atomic_write`."""
    import pyarrow.parquet

    others = iter(tables)
    first = next(others)
    with atomic_write(path) as file, pyarrow.parquet.ParquetWriter(file, first.schema, compression="zstd") as writer:
        for table in chain([first], others):
            writer.write_table(table)
