"""Ways to an actor's process where a call cannot reach it: an actor works off one call at a time, and this one may
hang.

    driver --task on the actor's node--> signal --> the process --> what the task returns

See `observability/stacks.py` for what a process says of itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_entropic.observability.stacks import stacks_of_family

TASK_S = 30.0
"""Seconds that Ray may take to run a task on a node."""
SHARED_MEMORY = "/dev/shm"
SHARED_MEMORY_NEEDED = 1 << 20
"""Free bytes below which shared memory counts as full; the smallest segment that Ray's store asks for is larger."""


@dataclass(frozen=True)
class ActorProcess:
    """Node and process id of an actor."""

    node_id: str
    pid: int


def this_process() -> ActorProcess:
    """Node and process id of this process, which is an actor's."""
    return ActorProcess(ray.get_runtime_context().get_node_id(), os.getpid())


def dump_stacks(processes: Mapping[str, ActorProcess], folder: Path) -> list[Path]:
    """Write a file for each process with the Python stacks of its threads; returns the files.

    Args:
        processes: processes by name ("policy rank 3").
        folder: folder of the files; created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in _on_nodes(_stacks_of, processes).items():
        path = folder / f"{name.replace(' ', '_')}.txt"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return sorted(written)


def write_stacks(run_dir: Path, processes: Mapping[str, ActorProcess]) -> str:
    """Write the stacks by `dump_stacks` into a new folder of the run; returns a sentence that names the files."""
    folder = run_dir / "stacks" / time.strftime("%Y%m%d-%H%M%S")
    names = ", ".join(path.name for path in dump_stacks(processes, folder))
    return f"what every process was doing is in {folder}: {names}{full_shared_memory()}"


def full_shared_memory() -> str:
    """Sentence if /dev/shm of this machine is full, else empty: calls then wait for objects that cannot be made."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:  # a system without it
        return ""
    if usage.free >= SHARED_MEMORY_NEEDED:
        return ""
    return (
        f"\n{SHARED_MEMORY} of this machine is full ({usage.total / 2**20:,.0f} MiB), and Ray hands objects over "
        "through it: remove what is not needed there, or give it more"
    )


def kill_processes(processes: Mapping[str, ActorProcess]) -> None:
    """End processes at once, also those that hang or were stopped; those that are gone already are left alone."""
    _on_nodes(_kill, processes)


def _on_nodes(function: ray.remote_function.RemoteFunction, processes: Mapping[str, ActorProcess]) -> dict[str, str]:
    """Results of `function`, called for each process on its node; a sentence where the node does not answer."""
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
    return [stacks_of_family(process.pid) for process in processes]


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
