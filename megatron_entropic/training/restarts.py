"""Going on after the loss of a process: everything is started anew and continues from the newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from megatron_entropic.errors import PeerDied, PhaseTimeout
from megatron_entropic.training.lifecycle import StopRequest
from megatron_entropic.training.run_directory import RunDirectory


def with_restarts(attempt: Callable[[], None], run: RunDirectory, stop: StopRequest, max_restarts: int) -> None:
    """Call `attempt` until it returns, at most `max_restarts` times more than once.

    Only what another attempt can cure leads to one: a process that is gone or does not answer.

    Raises:
        RunError: the last attempt's, or one that another attempt would meet again.
    """
    for restart in range(1, max_restarts + 1):
        try:
            attempt()
            return
        except (PeerDied, PhaseTimeout) as error:
            if stop.asked:
                raise
            run.record_restart(restart, max_restarts, error)
    attempt()
