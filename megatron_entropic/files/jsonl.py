"""JSON files: objects, and lines that survive a kill: appended durably, read with a torn last line, cut on resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_entropic.errors import RunError, UserError, reading


class JsonLinesWriter:
    """Appends objects to a file; each is on disk when `append` returns.

    Opening repairs a last line that a kill left half written, so that appending never glues two objects together.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        _cut(path, _end_of_last_whole_line(path.read_bytes()))
        # Unbuffered: what a failed write left unwritten must not come back at close.
        self._file = path.open("ab", buffering=0)

    def append(self, row: dict[str, Any]) -> None:
        """Write one object.

        Raises:
            OSError: naming the file; a half-written line is taken back first where that is possible.
            RunError: the file was deleted or replaced meanwhile: what is written would be in no folder.
        """
        self.append_all([row])

    def append_all(self, rows: list[dict[str, Any]], *, durable: bool = True) -> None:
        """Write several objects with one sync, or none where they need not be `durable`; it raises as `append` does."""
        self._check_place()
        before = os.fstat(self._file.fileno()).st_size
        text = "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
        # A lone surrogate, as a broken response can have, becomes its JSON escape.
        content = memoryview(text.encode("utf-8", errors="backslashreplace"))
        try:
            while content:
                content = content[self._file.write(content) :]
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), before)
            raise OSError(error.errno, f"cannot write to {self.path}: {error.strerror}") from error

    def _check_place(self) -> None:
        try:
            there = os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            raise RunError(
                f"{self.path} was deleted or replaced while it was written to; the same command continues from the "
                "newest checkpoint that is still there"
            )

    def truncate_after(self, step: int) -> None:
        """Drop every row from the first whose `step` is greater than `step`."""
        self.truncate_from(lambda row: row["step"] > step)

    def truncate_from(self, dropped: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the first row that `dropped` is true of, and every row after it."""
        offset = 0
        for line in _lines(self.path.read_bytes()):
            if dropped(json.loads(line)):
                break
            offset += len(line) + 1
        _cut(self.path, offset)

    def close(self) -> None:
        """Close the file; writing afterwards is an error."""
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every object of a file, in order. A torn last line, as a kill leaves it, is left out.

    Raises:
        UserError: no such file, or naming file and line of anything else that is not a JSON object.
    """
    with reading(path):
        content = path.read_bytes()
    rows = []
    for number, line in enumerate(_lines(content[: _end_of_last_whole_line(content)]), start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a file holds as a whole.

    Raises:
        UserError: it cannot be read, or is no JSON object.
        RunError: the disk or the machine failed meanwhile.
    """
    with reading(path):
        text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _lines(content: bytes) -> list[bytes]:
    """The lines of a content that ends in a newline. Only a newline ends one: others may stand inside an object."""
    return content.split(b"\n")[:-1]


def _end_of_last_whole_line(content: bytes) -> int:
    """Offset behind the last line that ends in a newline and is JSON.

    A power failure can also leave a last line of zero bytes, length on disk and content not; that is torn as well.
    """
    end = content.rfind(b"\n") + 1
    start = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
    if end == 0:
        return 0
    try:
        json.loads(content[start:end])
    except (ValueError, RecursionError):
        return start
    return end


def _cut(path: Path, size: int) -> None:
    if path.stat().st_size == size:
        return
    with path.open("r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())
