"""Runs of `megatron-entropic train` side by side, one process each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from processes import end
from ray_node import RayNode

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.5
GRACE_S = 120.0
"""For a run to save its state after it was asked to end."""
LOG_LINES_SHOWN = 5
ENVIRONMENT = {
    # One thread per process, and none that spins while it waits: the processes share the cores.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    # Nothing is fetched from a hub or reported home.
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


class Failure(RuntimeError):
    """A piece of work that did not succeed: what it was, and why."""


class Interrupted(RuntimeError):
    """The study was asked to end; what was running has saved its state."""


@dataclass(frozen=True)
class Work:
    """One thing to do: in a thread of its own, by means of processes."""

    name: str
    do: Callable[[], None]


class Pool:
    """Does work with a limited number of processes; a context manager that listens to SIGINT and SIGTERM.

    Args:
        processes: at most so many runs at a time.
        run_timeout_s: limit of one run; it is then ended, and continues in the next call of the study.
        say: shows a line to the user.
        node: Ray for all runs; None: each starts its own.
    """

    def __init__(
        self, processes: int, run_timeout_s: float, say: Callable[[str], None], node: RayNode | None = None
    ) -> None:
        self._processes = processes
        self._run_timeout_s = run_timeout_s
        self._say = say
        self._node = node
        self._stop = threading.Event()

    def __enter__(self) -> Pool:
        self._former = {number: signal.signal(number, self._listen) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def do_all(self, work: Iterable[Work]) -> dict[str, str]:
        """Do all of it, whatever fails; returns the reasons of failures by name.

        Raises:
            Interrupted: a signal asked for the end.
        """
        failures: dict[str, str] = {}
        with ThreadPoolExecutor(self._processes) as threads:
            names = {threads.submit(item.do): item.name for item in work}
            waiting, count = set(names), len(names)
            while waiting and not self._stop.is_set():
                done, waiting = wait(waiting, timeout=POLL_S, return_when=FIRST_COMPLETED)
                for future in done:
                    error = future.exception()
                    if error is not None and not isinstance(error, Failure | Interrupted):
                        self._stop.set()
                        raise error
                    if isinstance(error, Failure):
                        failures[names[future]] = str(error)
                    if not isinstance(error, Interrupted):
                        outcome = "done" if error is None else "failed"
                        self._say(f"[{count - len(waiting)}/{count}] {names[future]}: {outcome}")
            for future in waiting:
                future.cancel()
        if self._stop.is_set():
            raise Interrupted("interrupted; the same command continues")
        return failures

    def train(self, config: Path, overrides: list[str], log: Path) -> None:
        """Run `megatron-entropic train` to its end.

        Raises:
            Failure: it failed or passed its limit; with the end of its log.
            Interrupted: it was asked to end.
        """
        if self._stop.is_set():
            raise Interrupted(f"{log.stem}: not started")
        log.parent.mkdir(parents=True, exist_ok=True)
        joined = [] if self._node is None else [f"cluster.address={self._node.address}"]
        environment = ENVIRONMENT | os.environ | (self._node.environment if self._node else {})
        with log.open("w", encoding="utf-8") as output:
            # A session of its own: a Ctrl-C of the terminal reaches the run as the request that `end` sends.
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_entropic.cli", "train", str(config), *joined, *overrides],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            waited_s = 0.0
            while True:
                try:
                    status = process.wait(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    waited_s += POLL_S
                if self._stop.is_set() or waited_s > self._run_timeout_s:
                    end(process, GRACE_S)
                    if self._stop.is_set():
                        raise Interrupted(f"{log.stem}: ended")
                    raise Failure(f"not finished after {self._run_timeout_s:g} s, see {log}")
        if status:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            shown = "\n".join(f"    {line}" for line in lines[-LOG_LINES_SHOWN:])
            raise Failure(f"status {status}, see {log}\n{shown}")

    def _listen(self, _number: int, _frame: FrameType | None) -> None:
        self._stop.set()
