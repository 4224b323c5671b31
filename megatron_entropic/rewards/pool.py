"""Verifiers in processes of their own: one that hangs is killed, one that crashes takes nothing along."""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from megatron_entropic.config import RewardConfig
from megatron_entropic.errors import RunError
from megatron_entropic.rewards.verdict import Verdict

Job = tuple[str, Any, Mapping[str, Any]]
"""Response, ground truth, extra_info."""

_STARTUP_TIMEOUT_S = 180.0


class VerifierPool:
    """A fixed number of verifier processes, reused from job to job and replaced when they die."""

    def __init__(self, config: RewardConfig):
        """Start the processes and wait until each has imported its verifier.

        Raises:
            ValueError: the verifier does not exist or does not import.
            RunError: a process did not start.
        """
        self._workers = [_VerifierProcess(config) for _ in range(config.workers)]
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="verifier")
        try:
            list(self._threads.map(_VerifierProcess.start, self._workers))
        except (ValueError, RunError):
            self.close()
            raise
        self._idle: queue.SimpleQueue[_VerifierProcess] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def judge(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Verdicts in the order of the jobs."""
        return list(self._threads.map(self._judge_one, jobs))

    def close(self) -> None:
        """End every process."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def _judge_one(self, job: Job) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.judge(job)
        finally:
            self._idle.put(worker)


class _VerifierProcess:
    """One process; used by one thread at a time."""

    def __init__(self, config: RewardConfig):
        self._verifier, self._timeout_s, self._cpu_time_s = config.verifier, config.timeout_s, config.cpu_time_s
        limits = (config.timeout_s, config.cpu_time_s, config.memory_limit_gb)
        self._arguments = [config.verifier, *map(str, limits)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and wait for its verifier; see `VerifierPool`."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_entropic.rewards.worker", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        reply, expired = self._exchange(b"", _STARTUP_TIMEOUT_S)
        if reply is None or expired:
            self.stop()
            reason = f"was not ready within {_STARTUP_TIMEOUT_S:g} s" if expired else "died while starting"
            raise RunError(f"a process of the verifier {self._verifier!r} {reason}")
        if "failed" in reply:
            self.stop()
            raise ValueError(reply["failed"])

    def judge(self, job: Job) -> Verdict:
        """Judge one response within the time limit; a process that does not answer is killed and replaced."""
        if self._process is None:
            try:
                self.start()
            except (ValueError, RunError) as error:
                return Verdict("error", message=str(error))
        reply, expired = self._exchange(pickle.dumps(job), self._timeout_s)
        if reply is None or expired:
            code = self.stop()
        if reply is not None:
            return Verdict(reply["status"], reply["reward"], reply["message"])
        if expired:
            return Verdict("timeout", message=f"no verdict within {self._timeout_s:g} s")
        if code == -signal.SIGPROF:
            return Verdict("timeout", message=f"no verdict within {self._cpu_time_s:g} s of CPU time")
        return Verdict("error", message=f"the verifier process died (status {code})")

    def stop(self) -> int | None:
        """Kill the process and whatever it started; returns its exit status, None if there was no process."""
        process, self._process = self._process, None
        if process is None:
            return None
        _kill_group(process)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            _close_quietly(pipe)
        return process.wait()

    def _exchange(self, message: bytes, limit_s: float) -> tuple[dict[str, Any] | None, bool]:
        """Send bytes, wait for one line: (reply or None if the process died, whether the limit passed).

        The limit kills the process, which also frees this thread from a pipe that nobody reads or writes.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _kill_group(process)

        timer = threading.Timer(limit_s, expire)
        timer.start()
        try:
            process.stdin.write(message)
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        finally:
            timer.cancel()
            timer.join()
        return (json.loads(line) if line.endswith(b"\n") else None), expired.is_set()


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
