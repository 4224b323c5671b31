"""Ending early: on request, or because nothing is learnt any more.

A signal sets a flag, the loop saves at its next safe point and ends with a status of its own.

A launcher that hears of preemption or of the end of its time sends SIGUSR1 or SIGTERM, a person presses Ctrl-C. Safe
points are the end of a step and every moment of generation, during which the policy stands still. So the run ends
within the time of one score, update and publish phase and one checkpoint. Ctrl-C again ends it at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

from megatron_entropic.errors import Interrupted, PeerDied, PhaseTimeout, RunError, StopAsked
from megatron_entropic.training.journal import Journal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_INTERRUPTED = b"\ninterrupted: the run ends when its state is saved; Ctrl-C again ends it at once\n"


class StopRequest:
    """Listener for `SIGNALS` between enter and exit; to be used in the main thread."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._former = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        # Whoever ends a job may end its other processes at the same time: their loss is part of the request.
        if self.asked and isinstance(error, RunError) and not isinstance(error, StopAsked):
            raise self._kind()(f"{self._reason()}, and processes of the run were ended too: {error}") from error

    def listen(self) -> None:
        """Take the signals; call it again after something else (such as Ray when it starts) took them for itself."""
        for number in SIGNALS:
            # A shell starts what runs in the background with Ctrl-C ignored: it is meant for somebody else.
            if number != signal.SIGINT or self._former[number] != signal.SIG_IGN:
                signal.signal(number, self._receive)

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    def raise_if_asked(self) -> None:
        """End the run here, if a signal has come.

        Raises:
            StopAsked: a signal has come.
        """
        if self.asked:
            raise self._kind()(self._reason())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._received == signal.SIGINT:
                # What cleans up after this can be interrupted as usual.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt
            # Not through `sys.stderr` or the progress display, in the middle of whose work the signal may have come.
            os.write(2, _INTERRUPTED)
        self._received = signal.Signals(number)

    def _kind(self) -> type[StopAsked]:
        return Interrupted if self._received == signal.SIGINT else StopAsked

    def _reason(self) -> str:
        assert self._received is not None
        return f"asked to stop by {self._received.name}"


class SkipLimit:
    """Counter of steps in a row with an update that the optimizer skipped because loss or gradient was not finite.

    One such step is bad luck and costs its batch; many are a run that will not recover.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Count one step.

        Raises:
            RunError: it is the last of `limit` in a row.
        """
        self._in_a_row = self._in_a_row + 1 if metrics["optimizer/skipped"] else 0
        if self._in_a_row >= self._limit:
            raise RunError(
                f"step {step}: the update was not finite and was skipped, {self._in_a_row} steps in a row "
                "(train.max_skipped_steps). Their rollouts are kept; `megatron-entropic replay` computes such a step "
                "again. Try a lower optimizer.learning_rate, from an earlier checkpoint"
            )


# Going on after the loss of a process: everything is started anew and continues from the newest checkpoint.


def attempts(journal: Journal, stop: StopRequest, max_restarts: int) -> Iterator[Attempt]:
    """Yields an attempt at the run, and after each that lost a process another one, at most `max_restarts` of them.

    for attempt in attempts(journal, stop, max_restarts):
        with attempt:
            ...
    """
    for restart in range(1, max_restarts + 2):
        attempt = Attempt(stop, is_last=restart > max_restarts)
        yield attempt
        if attempt.loss is None:
            return
        journal.record_restart(restart, max_restarts, attempt.loss)


class Attempt:
    """Context of one attempt, out of which comes no error that another attempt can cure.

    That is a process that is gone or does not answer.
    """

    def __init__(self, stop: StopRequest, *, is_last: bool) -> None:
        self._stop, self._is_last = stop, is_last
        self.loss: RunError | None = None
        """Error that another attempt can cure, when the attempt has ended with one."""

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, PeerDied | PhaseTimeout) and not self._is_last and not self._stop.asked:
            self.loss = error
        return self.loss is not None
