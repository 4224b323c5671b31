"""One verifier process, seen from the outside; nothing here waits."""

from __future__ import annotations

import json
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import IO

from megatron_entropic.config.run import RewardConfig
from megatron_entropic.errors import RunError, UserError
from megatron_entropic.rewards.verdict import Job, Verdict

_STARTUP_TIMEOUT_S = 180.0
_READ_BYTES = 1 << 16


class VerifierProcess:
    """Starts, takes chunks of jobs, answers them in order; killed when one of them passes its limit.

    `start`, then `advance` whenever one of `interests` is ready or `deadline` has passed.
    """

    def __init__(self, config: RewardConfig, verifier: str):
        self._verifier, self._timeout_s, self._cpu_time_s = verifier, config.timeout_s, config.cpu_time_s
        limits = (config.timeout_s, config.cpu_time_s, config.memory_limit_gb)
        self._arguments = [verifier, *map(str, limits), config.format_pattern]
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers: deque[int] = deque()
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()
        self.ready = False
        """Whether it has imported its verifier."""
        self.takes_batches = False
        """Whether the verifier judges a whole chunk in one call."""
        self.failure = ""
        """Why the last start failed."""
        self._unusable = False
        self.deadline = math.inf
        """When it is to be killed, time.monotonic()."""

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
        """Hand over some jobs, each with a number of the caller's."""
        self._numbers.extend(number for number, _ in jobs)
        self._outgoing = memoryview(pickle.dumps([job for _, job in jobs]))
        self.deadline = time.monotonic() + self._timeout_s

    def interests(self) -> Iterator[tuple[int, int]]:
        """(descriptor, poll events) to wait for."""
        if self._process is not None:
            stdin, stdout = self._pipes()
            yield stdout.fileno(), select.POLLIN
            if self._outgoing:
                yield stdin.fileno(), select.POLLOUT

    def advance(self) -> tuple[dict[int, Verdict], list[int]]:
        """Write and read what is possible: (verdicts by number, numbers of jobs that it could not begin)."""
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
        _kill_group(self._process)
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
        """(verdicts, whether the process has closed its end)."""
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
                verdicts[self._numbers.popleft()] = Verdict(reply["status"], reply["reward"], reply["message"])
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


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and its children. It has not been waited for, so its id cannot belong to another."""
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
