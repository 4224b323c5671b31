"""What a command that takes minutes is doing: one line a phase, and in a terminal a line below that counts seconds.

with PhaseDisplay(Console(stderr=True)) as phases:
    phases.begin("starting Ray")                 #   0 s  starting Ray
    phases.begin("answering held", total=128)    #  21 s  answering held (128)
    phases.count()                               #  51 s    37 of 128
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.text import Text

from megatron_entropic.files.text import printable
from megatron_entropic.observability.live import live_display

_QUIET_S = 30.0
"""After so long without a line, plain output says how far a counted phase is."""


class PhaseDisplay:
    """Shows phases as they begin; a context manager."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console, self._now = console, now
        self._start = self._phase_start = self._last_line = now()
        self._name, self._done, self._total = "", 0, 0
        self._live = live_display(console, self._moving, transient=True)

    def __enter__(self) -> PhaseDisplay:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def begin(self, name: str, total: int = 0) -> None:
        """Show that a phase begins, which ends the one before.

        Args:
            total: things that `count` will count; 0: nothing is counted.
        """
        self._name, self._done, self._total, self._phase_start = name, 0, total, self._now()
        self._line(f"{name} ({total:,})" if total else name)

    def count(self) -> None:
        """One more of the phase's things is done."""
        self._done += 1
        if not self._console.is_terminal and self._now() - self._last_line >= _QUIET_S:
            self._line(f"  {self._progress()}")

    def _line(self, text: str) -> None:
        self._last_line = self._now()
        line = phase_line(self._last_line - self._start, text)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _progress(self) -> str:
        return f"{self._done:,} of {self._total:,}"

    def _moving(self) -> Text:
        counted = f"{self._progress()}, " if self._total else ""
        seconds = duration(self._now() - self._phase_start)
        return Text(printable(f"{self._name}: {counted}{seconds}") if self._name else "", "cyan")


def quiet(name: str) -> None:
    """In place of `PhaseDisplay.begin` where nobody waits."""


def phase_line(seconds: float, text: str) -> str:
    """A phase that began `seconds` after the command, as one line of a log."""
    return printable(f"{duration(seconds):>12}  {text}")


def duration(seconds: float) -> str:
    """3725 -> `1 h 02 min`, 80 -> `1 min 20 s`, 8 -> `8 s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
