"""Verifiers in processes of their own: one that hangs is killed, one that crashes takes nothing along.

One thread talks to all processes: jobs are taken at any time, and their verdicts are futures. Jobs go out in chunks, so
that a process need not wait for its next one; verdicts come back one by one, each job having the limits to itself.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import IO

from megatron_entropic.config.run import RewardConfig
from megatron_entropic.errors import RunError, UserError
from megatron_entropic.rewards.verifier import Job
from megatron_entropic.types import Verdict

_LONGEST_CHUNK = 16


@dataclass(slots=True)
class _Call:
    """Jobs of one call of a verifier: one, or several where it takes batches."""

    jobs: list[Job]
    future: Future[list[Verdict]] = field(default_factory=Future)
    verdicts: list[Verdict] = field(default_factory=list)

    def begin(self) -> bool:
        """Begin the call, which cannot be cancelled from then on; returns whether its verdicts are still wanted."""
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
        """Future of the verdicts, in the order of the jobs; more than one job only where the verifier takes batches.

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
        """Number of calls for one process: large while there is much to do, small at the end."""
        # Small at the end, so that no process has a queue while others are idle.
        if self.takes_batches:
            return 1
        return max(1, min(_LONGEST_CHUNK, len(self._waiting) // (4 * len(self._processes))))

    def _stop_processes(self) -> None:
        for process in self._processes:
            process.stop()

    def _wait(self) -> None:
        """Wait until a process can be read or written, its limit passes, or there is something new to do."""
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


# One verifier process, seen from the outside; nothing here waits.

_STARTUP_TIMEOUT_S = 180.0
_READ_BYTES = 1 << 16


class VerifierProcess:
    """One verifier process: takes chunks of jobs and answers them in order; killed when a job passes its limit.

    `start`, then `advance` whenever one of `interests` is ready or `deadline` has passed.
    """

    def __init__(self, config: RewardConfig, verifier: str):
        self._verifier, self._timeout_s, self._cpu_time_s = verifier, config.timeout_s, config.cpu_time_s
        self._arguments = [verifier, config.model_dump_json()]
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers: deque[int] = deque()
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()
        self.ready = False
        """Whether the process has imported its verifier."""
        self.takes_batches = False
        """Whether the verifier judges a whole chunk in one call."""
        self.failure = ""
        """Words for why the last start failed; empty if it did not."""
        self._unusable = False
        self.deadline = math.inf
        """Time, by time.monotonic(), at which the process is to be killed; inf: never."""

    @property
    def alive(self) -> bool:
        """Whether there is a process, ready or starting."""
        return self._process is not None

    @property
    def busy(self) -> bool:
        """Whether there are jobs without an answer."""
        return bool(self._numbers)

    def start(self) -> None:
        """Begin to start a process, if there is none."""
        if self._process is not None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_entropic.rewards.worker", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        for pipe in self._pipes():
            os.set_blocking(pipe.fileno(), False)
        self.failure = ""
        self.deadline = time.monotonic() + _STARTUP_TIMEOUT_S

    def raise_if_failed(self) -> None:
        """Raise what kept the process from starting.

        Raises:
            UserError: the verifier does not exist or does not import.
            RunError: the process died or did not become ready.
        """
        if self.failure:
            raise (UserError if self._unusable else RunError)(self.failure)

    def assign(self, jobs: list[tuple[int, Job]]) -> None:
        """Hand over some jobs, each with a number that the caller chose."""
        self._numbers.extend(number for number, _ in jobs)
        self._outgoing = memoryview(pickle.dumps([job for _, job in jobs]))
        self.deadline = time.monotonic() + self._timeout_s

    def interests(self) -> Iterator[tuple[int, int]]:
        """Yields the file descriptors to wait for, each with its poll events."""
        if self._process is not None:
            stdin, stdout = self._pipes()
            yield stdout.fileno(), select.POLLIN
            if self._outgoing:
                yield stdin.fileno(), select.POLLOUT

    def advance(self) -> tuple[dict[int, Verdict], list[int]]:
        """Write and read as much as is possible without waiting.

        Returns:
            (verdicts by number, numbers of the jobs that a process that ended could not begin).
        """
        if self._process is None:
            return {}, []
        self._write()
        verdicts, ended = self._read()
        if not ended and time.monotonic() < self.deadline:
            return verdicts, []
        code = self.stop()
        if not self.ready:
            reason = "died while starting" if ended else f"was not ready within {_STARTUP_TIMEOUT_S:g} s"
            self.failure = self.failure or f"a process of the verifier {self._verifier!r} {reason}"
        left = list(self._numbers)
        self._numbers.clear()
        self.ready = False
        if left:
            in_one_call = left if self.takes_batches else left[:1]
            verdicts |= dict.fromkeys(in_one_call, self._failure_of_a_job(ended, code))
            left = left[len(in_one_call) :]
        return verdicts, left

    def stop(self) -> int | None:
        """Kill the process and whatever it started; returns its exit status, None if there was no process."""
        if self._process is None:
            return None
        kill_group(self._process)
        for pipe in self._pipes():
            _close_quietly(pipe)
        process, self._process = self._process, None
        self._outgoing = memoryview(b"")
        self._incoming.clear()
        self.deadline = math.inf
        return process.wait()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def _write(self) -> None:
        try:
            while self._outgoing:
                self._outgoing = self._outgoing[os.write(self._pipes()[0].fileno(), self._outgoing) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            # It is dead or dying; reading its end says so.
            self._outgoing = memoryview(b"")

    def _read(self) -> tuple[dict[int, Verdict], bool]:
        """Read verdicts by number, and whether the process has closed its end."""
        ended = False
        try:
            while content := os.read(self._pipes()[1].fileno(), _READ_BYTES):
                self._incoming += content
            ended = True
        except BlockingIOError:
            ended = False
        *lines, rest = bytes(self._incoming).split(b"\n")
        self._incoming = bytearray(rest)
        verdicts = {}
        for reply in map(json.loads, lines):
            if self.ready:
                verdicts[self._numbers.popleft()] = Verdict(**reply)
                self.deadline = time.monotonic() + self._timeout_s if self._numbers else math.inf
            elif "failed" in reply:
                self.failure, self._unusable = reply["failed"], True
            else:
                self.ready, self.takes_batches, self.deadline = True, reply["takes_batches"], math.inf
        return verdicts, ended

    def _failure_of_a_job(self, ended: bool, code: int | None) -> Verdict:
        if not ended:
            return Verdict("timeout", message=f"no verdict within {self._timeout_s:g} s")
        if code == -signal.SIGPROF:
            return Verdict("timeout", message=f"no verdict within {self._cpu_time_s:g} s of CPU time")
        return Verdict("error", message=f"the verifier process died (status {code})")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to the process and its children. It has not been waited for, so its id cannot belong to another."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _close_quietly(pipe: IO[bytes]) -> None:
    """Close a pipe to a dead process; what was still to be written has nowhere to go."""
    try:
        pipe.close()
    except BrokenPipeError:
        return
