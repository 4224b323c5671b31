"""Progress of a copy: bytes, rate and time left; a bar in a terminal, a plain line every few seconds anywhere else."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_entropic.observability.progress import duration

_LINE_EVERY_S = 5.0


class TransferProgress:
    """Progress of one copy: within a `with` block, `begin` once with the size, then `advance` from any thread."""

    def __init__(self, title: str, console: Console) -> None:
        self._title, self._console = title, console
        self._lock = threading.Lock()
        self._done = self._total = 0
        self._started = self._told = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)

    def __enter__(self) -> TransferProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._total:
            self._tell()

    def begin(self, total_bytes: int) -> None:
        """Start to show progress: the work has been checked and begins."""
        self._total = total_bytes
        self._started = self._told = time.monotonic()
        if self._bar is None:
            self._console.print(f"{self._title}: {total_bytes / 1e9:.2f} GB", soft_wrap=True, highlight=False)
        else:
            self._task = self._bar.add_task(self._title, total=total_bytes)
            self._bar.start()

    def advance(self, nbytes: int) -> None:
        """Add bytes that are done."""
        with self._lock:
            self._done += nbytes
            if self._bar is not None:
                self._bar.advance(self._task, nbytes)
            elif time.monotonic() - self._told >= _LINE_EVERY_S:
                self._told = time.monotonic()
                self._tell()

    def _tell(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-3)
        rate = self._done / seconds
        left = duration((self._total - self._done) / rate) if rate else "unknown time"
        line = (
            f"{self._title}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left} left"
        )
        self._console.print(line, soft_wrap=True, highlight=False)
