"""Runs a function as several communicating processes on this machine, one thread each, and leaves none behind."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_entropic.policy.megatron.platform import silence_known_noise

COLLECTIVE_TIMEOUT_S = 300.0
"""A rank may wait so long for another that shares its core."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GLOO_SOCKET_IFNAME": "lo",
    "KINETO_LOG_LEVEL": "99",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Of a rank. The last two keep torch's profiler from announcing itself."""

PAGES_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20)}
"""glibc returns a large block to the kernel as soon as it is freed, and the next one costs a page fault every 4 KB.
With these settings it keeps them, as torch's allocator for a GPU does."""


def run_on_ranks(
    function: Callable[..., Iterator[Any]], ranks: int, *arguments: Any, timeout_s: float, pages_kept: bool = False
) -> Iterator[Any]:
    """Yields what `function(group, *arguments)` yields on rank 0, as it comes.

    Args:
        function: of a module, so that another process can import it. It runs on every rank.
        ranks: processes; megatron-core's tensor-parallel group, which is `group`, spans them.
        arguments: the same for all.
        timeout_s: for the whole.
        pages_kept: whether the ranks run with `PAGES_KEPT`.

    Raises:
        RuntimeError: a rank failed, or the time ran out.
    """
    with tempfile.TemporaryDirectory() as folder, _environment(PAGES_KEPT if pages_kept else {}):
        yield from run_processes(_in_group, ranks, Path(folder), function, arguments, timeout_s=timeout_s)


def run_processes(
    function: Callable[..., Iterator[Any]], ranks: int, *arguments: Any, timeout_s: float, reporter: int = 0
) -> Iterator[Any]:
    """Yields what `function(rank, ranks, *arguments)` yields on the rank `reporter`; otherwise as `run_on_ranks`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with _environment(ENVIRONMENT):
        processes = [
            context.Process(
                target=_rank, args=(function, rank, ranks, rank == reporter, sender, arguments), name=f"rank {rank}"
            )
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.daemon = True
                process.start()
            sender.close()
            yield from _results(receiver, processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _results(receiver: Connection, processes: list[Any], deadline: float) -> Iterator[Any]:
    waiting: list[Any] = [receiver]
    running = {process.sentinel: process for process in processes}
    while running or waiting:
        ready = wait([*waiting, *running], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"{', '.join(p.name for p in running.values())}: no end within the time limit")
        if receiver in ready:
            try:
                yield receiver.recv()
            except EOFError:
                waiting.clear()
            continue
        for sentinel in ready:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                raise RuntimeError(f"{process.name} failed with exit status {process.exitcode}; its reason is above")


def _rank(
    function: Callable[..., Iterator[Any]], rank: int, ranks: int, reports: bool, sender: Connection, arguments: Any
) -> None:
    torch.set_num_threads(1)
    for result in function(rank, ranks, *arguments):
        if reports:
            sender.send(result)


def _in_group(
    rank: int, ranks: int, folder: Path, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]
) -> Iterator[Any]:
    with tensor_parallel_group(rank, ranks, folder, "gloo") as group:
        yield from function(group, *arguments)


@contextmanager
def tensor_parallel_group(rank: int, ranks: int, folder: Path, backend: str) -> Iterator[dist.ProcessGroup]:
    """megatron-core's tensor-parallel group over all ranks (without megatron-core: torch's), while the block runs.

    Args:
        rank: of this process.
        ranks: of the group.
        folder: empty, known to all ranks; they meet there.
        backend: gloo or nccl.
    """
    silence_known_noise()
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    store = f"file://{folder / 'store'}"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        from megatron.core import parallel_state
    except ModuleNotFoundError:
        assert dist.group.WORLD is not None
        group = dist.group.WORLD
    else:
        parallel_state.initialize_model_parallel(ranks)
        group = parallel_state.get_tensor_model_parallel_group()
    try:
        yield group
    finally:
        dist.destroy_process_group()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables that processes started in the block inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
