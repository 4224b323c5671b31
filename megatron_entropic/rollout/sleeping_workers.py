"""vLLM processes of one engine that sleep while they wait for each other, where they share cores with other processes.

With tensor parallelism the engine and its workers talk through shared memory, and a reader looks at it in a loop for a
second after the last message before it sleeps. On a CPU these loops take the cores from the workers that load new
weights, and from the policy's ranks for a second after every rollout.
"""

from __future__ import annotations

import time
from typing import Any

_BUSY_LOOP_S = 0.0002
"""Longer than a message takes between two processes that both have a core."""
_PART_OF_WAIT, _LONGEST_MS = 0.1, 100
"""A notification can be lost. A reader looks again by itself after a tenth of the time that it has waited."""


def let_readers_sleep() -> None:
    """Shorten the loop in this process, if its device is the CPU. Repeatable."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or shm_broadcast.SpinCondition.__module__ == __name__:
        return

    class SleepingCondition(shm_broadcast.SpinCondition):
        """The same, but that it sleeps sooner and wakes by itself."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named, busy_loop_s=_BUSY_LOOP_S)

        def wait(self, timeout_ms: int | None = None) -> None:
            """Sleeps until a notification, `timeout_ms` or a part of the time since the last message is over."""
            waited_ms = 1000 * (time.monotonic() - self.last_read)
            recheck_ms = max(1, min(int(_PART_OF_WAIT * waited_ms), _LONGEST_MS))
            super().wait(recheck_ms if timeout_ms is None else min(timeout_ms, recheck_ms))

    shm_broadcast.SpinCondition = SleepingCondition
