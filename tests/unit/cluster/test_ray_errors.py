"""Each of Ray's exceptions becomes one sentence of the run: who is lost, how, and what to set."""

from __future__ import annotations

import inspect

import pytest
from ray import exceptions as ray_errors

from megatron_entropic.cluster.waiting import LOST, translated
from megatron_entropic.errors import PeerDied, PhaseTimeout, RunError

MEMORY = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.7, ID: 1b2c) where the task (actor ID: 3f, name=EngineWorker.__init__, pid=81, \
memory used=11.52GB) was running was 60.91GB / 64.00GB (0.951719), which exceeds the memory usage threshold of 0.95. \
Ray killed this worker (ID: 77) because it was the most recently scheduled task; to see more information about memory \
usage on this node, use `ray logs raylet.out -ip 10.0.0.7`.
Top 10 memory users:
PID	MEM(GB)	COMMAND
"""
MEMORY_SINCE_2_56 = """Memory on the node (IP: 127.0.0.1, ID: 5f1c) was 23.50GB used / 23.54GB limit (0.998)
OOM kill reason: Memory usage 25232932864B exceeded threshold of 24012353536B (95.0% of 25276514304B limit)
Object store memory usage: [- objects pinned: 3]
Ray killed 1 worker(s) based on the killing policy
(actor ID: 3f, name=PolicyWorker.__init__, pid=81, actual memory used=0.58GB, worker ID=77)
"""
CLASSES = [
    found
    for _, found in inspect.getmembers(ray_errors, inspect.isclass)
    if issubclass(found, ray_errors.RayError) and found is not ray_errors.RayError
]


def made(kind: type[ray_errors.RayError], text: str) -> ray_errors.RayError:
    """An exception of Ray, whose constructors all differ."""
    error = kind.__new__(kind, text)
    kind_with_text = type(kind.__name__, (kind,), {"__str__": lambda _self: text})
    error.__class__ = kind_with_text
    return error


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_exception_of_ray_is_one_line_that_names_peer_and_phase(kind: type[ray_errors.RayError]) -> None:
    told = translated(made(kind, "first words\nsecond\nthird"), "engine 1", "publish (weights version 3)")
    assert isinstance(told, RunError)
    assert str(told).startswith("publish (weights version 3): ")
    assert "engine 1" in str(told)
    assert len(str(told).splitlines()) == 1
    assert isinstance(told, PeerDied) == issubclass(kind, LOST)


def test_a_process_that_the_memory_monitor_ended_is_a_lost_one_with_its_figures() -> None:
    told = translated(ray_errors.OutOfMemoryError(MEMORY), "engine 0", "generate (step 3)")
    assert isinstance(told, PeerDied)
    assert str(told).startswith(
        "generate (step 3): engine 0 was ended because its node ran out of memory (60.91GB of 64.00GB in use, 11.52GB "
        "of it by this process). Use less: "
    )
    assert "RAY_memory_usage_threshold" in str(told)


def test_the_memory_of_node_and_process_are_read_from_the_newer_text_too() -> None:
    told = translated(ray_errors.OutOfMemoryError(MEMORY_SINCE_2_56), "policy rank 0", "score")
    assert "23.50GB of 23.54GB in use, 0.58GB of it by this process" in str(told)
    two = (
        MEMORY_SINCE_2_56
        + "(actor ID: 40, name=EngineWorker.__init__, pid=82, actual memory used=0.30GB, worker ID=78)"
    )
    told = translated(ray_errors.OutOfMemoryError(two), "policy rank 0", "score")
    assert "0.58GB and 0.30GB of it by the processes that were ended" in str(told)


def test_a_full_object_store_says_where_it_lies() -> None:
    told = translated(ray_errors.ObjectStoreFullError("Failed to put object 00ff"), "policy rank 1", "score")
    assert isinstance(told, PeerDied)
    assert "/dev/shm" in str(told)


def test_an_answer_that_cannot_be_fetched_is_a_timeout() -> None:
    assert isinstance(translated(ray_errors.GetTimeoutError("late"), "engine 0", "update"), PhaseTimeout)
