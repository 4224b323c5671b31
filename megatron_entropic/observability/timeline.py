"""What driver and engines did when, for Perfetto or chrome://tracing: RUN/timeline.json.

One track for the phases of the driver and one for each engine, in the format of Chrome's trace events
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU). The newest steps only: the file stays
small, however long the run.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

from megatron_entropic.files.atomic import write_text

TIMELINE_FILE = "timeline.json"
_WRITE_EVERY_STEPS = 5
"""Steps from one writing to the next."""


class Timeline:
    """Events of the newest steps, in a file that is written anew every few of them."""

    def __init__(self, output_dir: Path, keep_steps: int) -> None:
        """Keep `keep_steps` steps; 0 keeps and writes nothing."""
        self._path = output_dir / TIMELINE_FILE
        self._steps: deque[list[dict[str, Any]]] = deque(maxlen=keep_steps)
        self._now: list[dict[str, Any]] = []
        self._tracks: dict[str, int] = {}
        self._unwritten = 0

    def span(self, track: str, name: str, began_s: float, ended_s: float, **details: object) -> None:
        """Add work on a track; times in seconds since the epoch."""
        times = {"ts": round(began_s * 1e6), "dur": round((ended_s - began_s) * 1e6)}
        self._add({"name": name, "ph": "X", "tid": self._track(track), **times, "args": details})

    def count(self, name: str, at_s: float, value: float) -> None:
        """Add the value of a curve at a time, seconds since the epoch."""
        self._add({"name": name, "ph": "C", "tid": 0, "ts": round(at_s * 1e6), "args": {name: value}})

    def finish_step(self) -> None:
        """End a step; writes the file if it is time for it.

        Raises:
            OSError: naming the file.
        """
        self._steps.append(self._now)
        self._now = []
        self._unwritten += 1
        if self._unwritten >= _WRITE_EVERY_STEPS:
            self.write()

    def write(self) -> None:
        """Write what is kept, if there is anything new."""
        if not self._unwritten or not self._steps.maxlen:
            return
        self._unwritten = 0
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": track}}
            for track, number in self._tracks.items()
        ]
        events = [*names, *(event for step in self._steps for event in step)]
        write_text(self._path, json.dumps({"traceEvents": events}, separators=(",", ":")), durable=False)

    def _track(self, name: str) -> int:
        return self._tracks.setdefault(name, len(self._tracks) + 1)

    def _add(self, event: dict[str, Any]) -> None:
        if self._steps.maxlen:
            self._now.append({"pid": 1, **event})
