"""Instruments: memory, clocks and collectives, on a CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler._utils import traverse_dfs

Result = TypeVar("Result")

SENT: dict[str, Callable[..., Tensor]] = {
    "all_reduce": lambda tensor, *_: tensor,
    "all_gather": lambda _, tensor, *__: tensor,
    "all_gather_into_tensor": lambda _, tensor, *__: tensor,
    "reduce_scatter_tensor": lambda _, tensor, *__: tensor,
}
"""Functions of torch.distributed, and which of their arguments is what this rank contributes."""


def peak_extra_bytes(work: Callable[[], Result], device: torch.device) -> tuple[int, Result]:
    """(highest number of bytes that tensors made during `work` occupy at once, its result).

    What existed before is not counted, nor is its end. On a CPU the allocator's events are replayed in order.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        result = work()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = traverse_dfs(profile.profiler.kineto_results.experimental_event_tree())
    allocations = [event for event in events if event.tag == _EventType.Allocation]
    allocations.sort(key=lambda event: event.start_time_ns)
    return _peak((event.extra_fields.ptr, event.extra_fields.alloc_size) for event in allocations), result


def _peak(changes: Iterable[tuple[int, int]]) -> int:
    """The highest sum of (address, bytes) over time; only the end of what was also made here has bytes < 0 that count.

    The profiler keeps the size of what it once saw made and did not see end, by address: where another tensor got that
    address later and ends now, it reports an end of the old size.
    """
    alive: dict[int, int] = {}
    total = highest = 0
    for address, change in changes:
        if change > 0:
            alive[address] = change
            total += change
        else:
            total -= alive.pop(address, 0)
        highest = max(highest, total)
    return highest


@dataclass(frozen=True)
class Seconds:
    """CPU time of the process (user and system, all threads) and wall time. On a GPU both are the GPU's time."""

    cpu: float
    wall: float


class Stopwatch:
    """Marks moments and tells the time between them; a GPU's marks are events in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """A moment."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(Seconds(time.process_time(), time.perf_counter()))

    def since_first(self) -> list[Seconds]:
        """Time from the first mark to each of the others."""
        first, *others = self._marks
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            elapsed = [first.elapsed_time(mark) / 1e3 for mark in others]
            return [Seconds(seconds, seconds) for seconds in elapsed]
        return [Seconds(mark.cpu - first.cpu, mark.wall - first.wall) for mark in others]


@dataclass
class Traffic:
    """Collectives of this rank."""

    calls: int = 0
    bytes: int = 0
    """What this rank contributed to them."""
    log: list[str] = field(default_factory=list)
    """Their names, in order."""


@contextmanager
def counted_collectives(groups: Sequence[dist.ProcessGroup]) -> Iterator[Traffic]:
    """Counts calls of torch.distributed's collectives inside the block.

    Args:
        groups: whose own counters must agree: a collective by another way than `SENT` is an error, not a zero.

    Raises:
        RuntimeError: they do not agree.
    """
    traffic = Traffic()
    originals = {name: getattr(dist, name) for name in SENT}
    before = _collectives_so_far(groups)
    for name, original in originals.items():
        setattr(dist, name, _counting(name, original, traffic))
    try:
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    seen = _collectives_so_far(groups) - before
    if groups and seen != traffic.calls:
        raise RuntimeError(f"{seen} collectives ran, but {traffic.calls} were counted: {traffic.log}")


def _collectives_so_far(groups: Sequence[dist.ProcessGroup]) -> int:
    """By the groups' own counters."""
    return sum(group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]


def _counting(name: str, original: Callable[..., Any], traffic: Traffic) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        traffic.calls += 1
        traffic.bytes += SENT[name](*args).nbytes
        traffic.log.append(name)
        return original(*args, **options)

    return call
