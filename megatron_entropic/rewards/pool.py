"""Verifiers in processes of their own: one that hangs is killed, one that crashes takes nothing along.

One thread talks to all processes: jobs are taken at any time, and their verdicts are futures. Jobs go out in chunks, so
that a process need not wait for its next one; verdicts come back one by one, each job having the limits to itself.
"""

from __future__ import annotations

import itertools
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_entropic.config.run import RewardConfig
from megatron_entropic.errors import RunError
from megatron_entropic.rewards.process import VerifierProcess
from megatron_entropic.rewards.verdict import Job, Verdict

_LONGEST_CHUNK = 16


@dataclass(slots=True)
class _Call:
    """What a verifier is asked at once: one job, or several where it takes batches."""

    jobs: list[Job]
    future: Future[list[Verdict]] = field(default_factory=Future)
    verdicts: list[Verdict] = field(default_factory=list)

    def begin(self) -> bool:
        """Whether the verdicts are still wanted; from then on they cannot be cancelled."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def answer(self, verdict: Verdict) -> None:
        """Take the verdict of the next job."""
        self.verdicts.append(verdict)
        if len(self.verdicts) == len(self.jobs):
            self.future.set_result(self.verdicts)


class VerifierPool:
    """A fixed number of verifier processes, reused from job to job and replaced when they die."""

    def __init__(self, config: RewardConfig, verifier: str):
        """Start the processes and wait until each has imported its verifier.

        Raises:
            ValueError: the verifier does not exist or does not import.
            RunError: a process did not start.
        """
        self._processes = [VerifierProcess(config, verifier) for _ in range(config.workers)]
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            for process in self._processes:
                process.start()
            while any(not process.ready for process in self._processes):
                self._wait()
                for process in self._processes:
                    process.advance()
                    process.raise_if_failed()
        except (ValueError, RunError):
            self._stop_processes()
            os.close(self._wake)
            raise
        self.takes_batches = self._processes[0].takes_batches
        """Whether the verifier judges all jobs of a call together."""
        self._lock = threading.Lock()
        self._waiting: deque[_Call] = deque()
        self._closed = False
        self._numbers = itertools.count()
        self._running: dict[int, _Call] = {}
        self._thread = threading.Thread(target=self._serve, name=f"pool of {verifier}", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> Future[list[Verdict]]:
        """The verdicts to be, in the order of the jobs; more than one job only where the verifier takes batches.

        Raises:
            RunError: the pool is closed, or broke down.
        """
        call = _Call(list(jobs))
        with self._lock:
            if self._closed:
                raise RunError("the verifier processes have been ended")
            self._waiting.append(call)
        os.eventfd_write(self._wake, 1)
        return call.future

    def close(self) -> None:
        """End every process; verdicts that are not there yet will never be, and whoever waits for one gets RunError."""
        with self._lock:
            self._closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _serve(self) -> None:
        reason: BaseException = RunError("the verifier processes have been ended")
        try:
            while not self._closed:
                self._hand_out()
                self._wait()
                self._collect()
        except BaseException as error:  # noqa: BLE001  whoever waits for a verdict must hear of it
            reason = error
        with self._lock:
            self._closed = True
        self._stop_processes()
        for call in {id(call): call for call in (*self._running.values(), *self._waiting)}.values():
            if call.begin():
                call.future.set_exception(reason)

    def _hand_out(self) -> None:
        """Replace processes that died, and give those that have nothing to do some of what is waiting."""
        for process in self._processes:
            if not process.alive:
                if process.failure:
                    # Each failed start costs one call, so that this ends.
                    cost = self._take(1)
                    if not cost:
                        continue
                    for _ in range(len(cost[0].jobs) - len(cost[0].verdicts)):
                        cost[0].answer(Verdict("error", message=process.failure))
                process.start()
            if process.ready and not process.busy and (calls := self._take(self._chunk_size())):
                chunk = [(next(self._numbers), call, job) for call in calls for job in call.jobs]
                self._running |= {number: call for number, call, _ in chunk}
                process.assign([(number, job) for number, _, job in chunk])

    def _collect(self) -> None:
        """Take the verdicts that have come, and back what a process that died has not begun."""
        for process in self._processes:
            answered, left = process.advance()
            for number, verdict in answered.items():
                self._running.pop(number).answer(verdict)
            if left:
                calls = [self._running.pop(number) for number in left]
                with self._lock:
                    self._waiting.extendleft(reversed(calls))

    def _take(self, count: int) -> list[_Call]:
        """The next `count` waiting calls whose verdicts are still wanted, or as many as there are."""
        taken: list[_Call] = []
        with self._lock:
            while self._waiting and len(taken) < count:
                call = self._waiting.popleft()
                if call.begin():
                    taken.append(call)
        return taken

    def _chunk_size(self) -> int:
        """Large while there is much to do; at the end small, so that no process has a queue while others are idle."""
        if self.takes_batches:
            return 1
        return max(1, min(_LONGEST_CHUNK, len(self._waiting) // (4 * len(self._processes))))

    def _stop_processes(self) -> None:
        for process in self._processes:
            process.stop()

    def _wait(self) -> None:
        """Until a process can be read or written, its limit passes, or there is something new to do."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        deadline = math.inf
        for process in self._processes:
            for descriptor, events in process.interests():
                poll.register(descriptor, events)
            deadline = min(deadline, process.deadline)
        limit_s = max(0.0, deadline - time.monotonic())
        ready = poll.poll(None if math.isinf(limit_s) else math.ceil(1000 * limit_s))
        if any(descriptor == self._wake for descriptor, _ in ready):
            os.eventfd_read(self._wake)
