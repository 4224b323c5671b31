"""Reaching an actor's process where a call cannot: an actor works off one call at a time, and this one may hang.

    driver --task on the actor's node--> signal --> the process writes the stacks of its threads --> driver: files

The handler is C code that runs at once, whatever the process is waiting for. A process that was stopped or is gone
writes nothing; then the file says what Linux knows of it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_S = 3.0
"""How long a process may take to write its stacks."""
TASK_S = 30.0
"""How long Ray may take to run a task on a node."""


@dataclass(frozen=True)
class ActorProcess:
    """Where an actor runs."""

    node_id: str
    pid: int
    stacks_fd: int
    """The process's descriptor of the memory that its stacks go to."""


class StackWriter:
    """Lets this process write the Python stacks of all its threads when `dump_stacks` asks for them."""

    def __init__(self) -> None:
        self._memory = os.memfd_create("stacks")
        faulthandler.register(signal.SIGUSR2, file=self._memory, all_threads=True)

    def place(self) -> ActorProcess:
        """How the driver finds this process."""
        return ActorProcess(ray.get_runtime_context().get_node_id(), os.getpid(), self._memory)


def dump_stacks(processes: Mapping[str, ActorProcess], folder: Path) -> list[Path]:
    """One file for each process with the Python stacks of its threads; returns the files.

    Args:
        processes: by name ("policy rank 3").
        folder: where the files go; created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in _on_nodes(_stacks_of, processes).items():
        path = folder / f"{name.replace(' ', '_')}.txt"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return sorted(written)


def write_stacks(run_dir: Path, processes: Mapping[str, ActorProcess]) -> str:
    """`dump_stacks` into a new folder of the run; returns a sentence that names the files."""
    folder = run_dir / "stacks" / time.strftime("%Y%m%d-%H%M%S")
    names = ", ".join(path.name for path in dump_stacks(processes, folder))
    return f"what every process was doing is in {folder}: {names}"


def kill_processes(processes: Mapping[str, ActorProcess]) -> None:
    """End processes at once, also those that hang or were stopped; those that are gone already are left alone."""
    _on_nodes(_kill, processes)


def _on_nodes(function: ray.remote_function.RemoteFunction, processes: Mapping[str, ActorProcess]) -> dict[str, str]:
    """What `function` returns for each process, called on its node; a sentence where the node does not answer."""
    names_on: defaultdict[str, list[str]] = defaultdict(list)
    for name, process in processes.items():
        names_on[process.node_id].append(name)
    calls = {}
    for node_id, names in names_on.items():
        here = NodeAffinitySchedulingStrategy(node_id, soft=False)
        calls[node_id] = function.options(scheduling_strategy=here).remote([processes[name] for name in names])
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=TASK_S)
    found: dict[str, str] = {}
    for node_id, call in calls.items():
        try:
            answers = ray.get(call, timeout=0)
        except ray.exceptions.RayError as error:
            answers = [f"node {node_id} does not answer: {error}\n"] * len(names_on[node_id])
        found |= dict(zip(names_on[node_id], answers, strict=True))
    return found


@ray.remote(num_cpus=0, max_retries=0)
def _stacks_of(processes: list[ActorProcess]) -> list[str]:
    return [_stacks(process) for process in processes]


@ray.remote(num_cpus=0, max_retries=0)
def _kill(processes: list[ActorProcess]) -> list[str]:
    answers = []
    for process in processes:
        try:
            os.kill(process.pid, signal.SIGKILL)
            answers.append("killed")
        except ProcessLookupError:
            answers.append("gone")
    return answers


def _stacks(process: ActorProcess) -> str:
    file = Path(f"/proc/{process.pid}/fd/{process.stacks_fd}")
    try:
        before = file.stat().st_size
        os.kill(process.pid, signal.SIGUSR2)
    except (FileNotFoundError, ProcessLookupError):
        return f"process {process.pid} is gone\n"
    deadline = time.monotonic() + ANSWER_S
    size = before
    while time.monotonic() < deadline:
        time.sleep(0.1)
        # Complete when it has stopped growing.
        if (now := file.stat().st_size) == size > before:
            return file.read_bytes()[before:].decode(errors="replace")
        size = now
    state = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()[2]
    return f"process {process.pid} did not write its stacks within {ANSWER_S:g} s; {state}\n"
