"""Wall time of a step, by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseClock:
    """Adds up wall time by phase within a step.

        with clock.phase("generate"):
            ...
        metrics |= clock.finish_step()      # time/generate_s, ..., time/step_s

    A phase inside another takes its time away from the outer one, so that phases and what lies between them add up
    to the step. The first step begins with the first phase: starting up is no part of it.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._step_start: float | None = None
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._mark = 0.0

    @property
    def current(self) -> str | None:
        """The innermost phase that is running, for messages about what was going on."""
        return self._running[-1] if self._running else None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under `name`; a phase entered again in the same step goes on adding."""
        self._account()
        if self._step_start is None:
            self._step_start = self._mark
        self._running.append(name)
        try:
            yield
        finally:
            self._account()
            self._running.pop()

    def finish_step(self) -> dict[str, float]:
        """Metrics of the step: `time/<phase>_s` in seconds, and `time/step_s` since the previous call; starts anew."""
        self._account()
        metrics = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        metrics["time/step_s"] = 0.0 if self._step_start is None else self._mark - self._step_start
        self._step_start = self._mark
        self._seconds = {}
        return metrics

    def _account(self) -> None:
        """Give the time since the last call to the innermost running phase."""
        now = self._now()
        if self._running:
            self._seconds[self._running[-1]] = self._seconds.get(self._running[-1], 0.0) + now - self._mark
        self._mark = now
