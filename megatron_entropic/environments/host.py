"""Environments in processes of their own, as the driver sees them.

    ask(call) --> the process that has the conversation, else one with few --> answer, in a thread of the host's

One process has many conversations at a time. A process that dies, or says nothing for too long, is replaced: its
conversations go on in another one, which is told what happened so far. The call that it had in hand is tried once more;
if that process dies too, the conversation ends. One with a thread that hangs gets no new conversations.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_entropic.config.data import EnvironmentConfig
from megatron_entropic.environments.conversation import Answer, Answered, Call
from megatron_entropic.errors import RunError, UserError
from megatron_entropic.rewards.pool import kill_group

_STARTUP_TIMEOUT_S = 180.0
_GRACE_S = 15.0
"""Time beyond reply_timeout_s after which a process that says nothing has lost its event loop."""
_LOOK_S = 1.0
_CALLS_OF_A_TURN = 2
"""Calls of an environment that one turn can cost: reply and reward."""


@dataclass(slots=True, eq=False)
class _Pending:
    call: Call
    answered: Answered
    tries: int = 0
    deadline: float = 0.0


@dataclass(slots=True, eq=False)
class _Process:
    """One process, with two threads that write to it and read from it: either may have to wait."""

    popen: subprocess.Popen[bytes]
    outbox: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)
    ready: threading.Event = field(default_factory=threading.Event)
    failure: str = ""
    """Words for why it cannot work, from itself."""
    begun: bool = False
    """Whether it has made an environment; one that has not is no better a second time."""
    pending: dict[int, _Pending] = field(default_factory=dict)
    live: set[tuple[str, int]] = field(default_factory=set)
    """Conversations that it has."""
    stuck: int = 0
    silent: bool = False
    """Whether it was ended for saying nothing."""


class EnvironmentHost:
    """Carries calls to environments in `environment.workers` processes; a context manager."""

    def __init__(self, config: EnvironmentConfig, hf_dir: Path) -> None:
        """Start the processes, and wait until they have made an environment.

        Args:
            config: the section, with a name.
            hf_dir: directory of the tokenizer.

        Raises:
            UserError: the environment does not exist or cannot be made.
            RunError: a process does not start.
        """
        self._config, self._hf_dir = config, hf_dir
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._processes: list[_Process] = []
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._seconds: list[float] = []
        self._differences = self._restarts = 0
        self.gives_reward = False
        """Whether the environment says of itself that it rewards every conversation."""
        try:
            for _ in range(config.workers):
                self._processes.append(self._started())
            for process in self._processes:
                self._await_ready(process)
        except BaseException:
            self.close()
            raise
        self._watch = threading.Thread(target=self._watching, name="environments", daemon=True)
        self._watch.start()

    def ask(self, call: Call, answered: Answered) -> None:
        """See `Environments`; `answered` is called in a thread of the host's, which holds no lock."""
        self._send(_Pending(call, answered))

    def check(self) -> None:
        """Raise what a thread of the host met.

        Raises:
            RunError: a process does not start any more.
        """
        if self._error is not None:
            raise self._error

    def take_metrics(self) -> dict[str, float]:
        with self._lock:
            seconds, self._seconds = self._seconds, []
            differences, self._differences = self._differences, 0
            restarts, self._restarts = self._restarts, 0
        return {
            "time/environment_mean_s": fmean(seconds) if seconds else 0.0,
            "time/environment_max_s": max(seconds, default=0.0),
            "environment/rebuilt_differences": float(differences),
            "environment/restarts": float(restarts),
        }

    def close(self) -> None:
        """End every process; calls that are not answered never are."""
        self._closed.set()
        with self._lock:
            processes, self._processes = self._processes, []
        for process in processes:
            _end(process)

    def __enter__(self) -> EnvironmentHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, pending: _Pending) -> None:
        key = (pending.call.key.group, pending.call.key.sample)
        with self._lock:
            if not self._processes:
                return  # closed
            process = self._process_of(key)
            before = 0 if key in process.live else len(pending.call.turns)
            process.live.add(key)
            number = next(self._numbers)
            longest_s = (before + _CALLS_OF_A_TURN) * self._config.reply_timeout_s
            pending.deadline = time.monotonic() + longest_s + _GRACE_S
            process.pending[number] = pending
            process.outbox.put(pickle.dumps((number, pending.call)))

    def _process_of(self, key: tuple[str, int]) -> _Process:
        """The process that has a conversation, else the one with the fewest that nothing hangs in."""
        for process in self._processes:
            if key in process.live:
                return process
        return min(self._processes, key=lambda process: (process.stuck > 0, len(process.live)))

    def _started(self) -> _Process:
        popen = subprocess.Popen(
            [
                *(sys.executable, "-m", "megatron_entropic.environments.worker"),
                *(self._config.model_dump_json(), str(self._hf_dir)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._variables(),
            start_new_session=True,
        )
        process = _Process(popen)
        for work in (self._writing, self._reading):
            threading.Thread(target=work, args=(process,), name=f"environments {popen.pid}", daemon=True).start()
        return process

    def _variables(self) -> dict[str, str]:
        """The variables of a process's environment, in the other sense of the word."""
        variables = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if (folder := self._config.packages_dir) is not None:
            if not folder.is_dir():
                raise UserError(f"environment.packages_dir={folder}: there is no such folder")
            before = os.environ.get("PYTHONPATH")
            variables["PYTHONPATH"] = os.pathsep.join([str(folder.resolve()), *([before] if before else [])])
        return variables

    def _await_ready(self, process: _Process) -> None:
        in_time = process.ready.wait(_STARTUP_TIMEOUT_S)
        if process.failure:
            raise UserError(process.failure)
        if not process.begun:
            how = "ended while starting" if in_time else f"was not ready within {_STARTUP_TIMEOUT_S:g} s"
            raise RunError(f"a process of the environment {self._config.name!r} {how}; what it said is above")

    def _writing(self, process: _Process) -> None:
        stdin = process.popen.stdin
        assert stdin is not None
        while (content := process.outbox.get()) is not None:
            try:
                stdin.write(content)
                stdin.flush()
            except OSError:
                return  # it is dead; whoever reads from it knows

    def _reading(self, process: _Process) -> None:
        stdout = process.popen.stdout
        assert stdout is not None
        try:
            for line in stdout:
                self._take(process, json.loads(line))
            self._lost(process)
        except BaseException as error:  # noqa: BLE001  whoever waits for an answer must hear of it
            self._error = error
        finally:
            process.ready.set()

    def _take(self, process: _Process, row: dict[str, Any]) -> None:
        if "failed" in row:
            process.failure = row["failed"]
            process.ready.set()
            return
        if "ready" in row:
            self.gives_reward, process.begun = row["gives_reward"], True
            process.ready.set()
            return
        answer = Answer.of_row(row)
        with self._lock:
            pending = process.pending.pop(row["number"], None)
            process.stuck = row["stuck"]
            self._seconds.append(answer.seconds)
            self._differences += answer.differences
            if pending is not None and answer.tokens is None:
                process.live.discard((pending.call.key.group, pending.call.key.sample))
        if pending is not None:
            pending.answered(answer)

    def _lost(self, process: _Process) -> None:
        """Replace a process that ended; what it had in hand goes to another one, or was one too many."""
        if self._closed.is_set() or not process.begun:
            return  # whoever waits for it to be ready says why it is not
        code = process.popen.wait()
        _end(process)
        fresh = self._started()
        with self._lock:
            if process not in self._processes:  # the host was closed meanwhile
                _end(fresh)
                return
            self._processes[self._processes.index(process)] = fresh
            self._restarts += 1
            # From now on nothing goes to the old one any more.
            left, process.pending = list(process.pending.values()), {}
        self._await_ready(fresh)
        now = time.monotonic()
        for pending in left:
            pending.tries += 1
            if process.silent and pending.deadline < now:
                pending.answered(Answer(None, "timeout", message="its process said nothing any more, and was ended"))
            elif pending.tries > 1:
                pending.answered(Answer(None, "lost", message=f"its process ended twice (status {code})"))
            else:
                self._send(pending)

    def _watching(self) -> None:
        """End processes that say nothing for too long, and those in which something hangs once they are empty."""
        while not self._closed.wait(_LOOK_S):
            now = time.monotonic()
            with self._lock:
                processes = list(self._processes)
                silent = [one for one in processes if any(call.deadline < now for call in one.pending.values())]
                useless = [one for one in processes if one.stuck and not one.live]
            for process in silent:
                process.silent = True
            for process in (*silent, *useless):
                _kill(process)


def _kill(process: _Process) -> None:
    """Kill the process and its children, unless it has been waited for: its id may be another's by now."""
    if process.popen.returncode is None:
        kill_group(process.popen)


def _end(process: _Process) -> None:
    """Kill the process, and let its threads end."""
    _kill(process)
    process.popen.wait()
    process.outbox.put(None)
    with contextlib.suppress(OSError):
        assert process.popen.stdin is not None
        process.popen.stdin.close()
