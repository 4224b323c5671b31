"""Writing a checkpoint beside the steps that follow it.

    main threads, all ranks together        plan; a copy of each rank's tensors in host memory
    a background thread of each rank        files, their sums; on rank 0 manifest, rename, deletion of older ones

The background threads agree through a gloo group of their own, so that their messages never meet those of the training.
At most one checkpoint is being written. What goes wrong is raised on all ranks when the run asks, or before the next
one is begun; checkpoints that were complete before are not touched.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Collection, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megatron_entropic.checkpoints.run_checkpoints import (
    begin_checkpoint,
    checksums,
    discard,
    finish_checkpoint,
    partial_path,
    prune_checkpoints,
)
from megatron_entropic.config.run import CheckpointConfig
from megatron_entropic.policy.megatron.patches import apply_checkpoint_patches
from megatron_entropic.policy.state.checkpoint import CheckpointError, sharded_state
from megatron_entropic.policy.step.optimizer import Format, PolicyOptimizer
from megatron_entropic.policy.step.optimizer_shards import SHARDS

SPACE_MARGIN_BYTES = 32 * 2**20
"""Free space asked for beyond the tensors: metadata and small state."""

BACKGROUND_NICENESS = 10
"""Niceness of the thread that writes, from 0 (as everything else) to 19."""


class CheckpointWriter:
    """One policy rank's part in saving. All ranks call every method together.

    Args:
        config: how many checkpoints to keep, and whether the run waits for the files.
        device: device of the parameters.
        timeout_s: limit of every wait of the background threads for each other, seconds.
        keep_steps: steps whose checkpoints are kept for ever, beside those of `checkpoint.keep_every`.
    """

    def __init__(
        self, config: CheckpointConfig, device: torch.device, timeout_s: float, keep_steps: Collection[int] = ()
    ) -> None:
        self._config = config
        self._keep_steps = keep_steps
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._name = self._agree_on_a_name()
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint", initializer=_prepare_thread, initargs=(device,)
        )
        self._writing: Future[None] | None = None
        self._layout_checked = False
        self._format_chosen = False
        self._format: Format = config.format
        self._shards: str | None = None
        self._copies = HostCopies()

    def save(
        self, directory: Path, model: torch.nn.ModuleList, optimizer: PolicyOptimizer, state: dict[str, Any]
    ) -> None:
        """Write a checkpoint; with `checkpoint.asynchronous` returns when everything is copied.

        Args:
            directory: where the complete checkpoint will be, on a file system that all ranks share.
            model: the chunks of this rank's stage, not wrapped.
            optimizer: its optimizer; its parameters must be synchronised.
            state: JSON, the same on every rank; rank 0's is written.

        Raises:
            CheckpointError: this or the one before could not be written, for instance for want of space. What there
                was of it is removed.
        """
        self.check(wait=True)
        record = {"state": state, "ranks": dist.get_world_size(), "schedule_steps": optimizer.steps_taken}
        json.dumps(record)  # what is not JSON fails here, on all ranks
        apply_checkpoint_patches()
        tensors = sharded_state(model)
        self._choose_format(optimizer, tensors["model"])
        tensors["optimizer"] = optimizer.sharded_state_dict(tensors["model"], loading=False, format=self._format)
        commit = self._stage(directory, tensors, next(model.parameters()).device)
        self._writing = self._thread.submit(self._write, directory, commit, record)
        if not self._config.asynchronous:
            self.check(wait=True)
            self._copies = HostCopies()  # the run stands still for the whole save: their pages are the least of it

    def check(self, *, wait: bool) -> None:
        """Raise if the last checkpoint could not be written; with `wait` not before that is known.

        Raises:
            CheckpointError: naming directory, rank and reason, once.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return
        writing, self._writing = self._writing, None
        writing.result()

    def close(self) -> None:
        """Wait for the thread; what it fails with is nobody's concern any more."""
        self._thread.shutdown()

    def _agree_on_a_name(self) -> str:
        """Agree on a name of this run's ranks, unlike that of any others that may still be writing beside them."""
        name = [f"{socket.gethostname()}-{os.getpid()}"]
        dist.broadcast_object_list(name, src=0, group=self._group)
        return name[0]

    def _partial(self, directory: Path) -> Path:
        return partial_path(directory, self._name)

    def _choose_format(self, optimizer: PolicyOptimizer, model_state: dict[str, Any]) -> None:
        """Choose the format, once: neither the layout nor what it can write changes from one save to the next."""
        if self._format_chosen:
            return
        self._format = optimizer.format_to_write(self._config.format)
        if self._format == "dp_reshardable":
            self._shards = optimizer.shards(model_state, self._group).to_json()
        self._format_chosen = True

    def _stage(self, directory: Path, tensors: dict[str, Any], device: torch.device) -> Callable[[], None]:
        """Plan and copy; returns a function that writes this rank's files and, on rank 0, their index."""
        from megatron.core import dist_checkpointing

        live = _storages(tensors)
        needed = _bytes_to_write(tensors, device) + SPACE_MARGIN_BYTES
        self._on_rank_zero(directory, lambda: _find_space(begin_checkpoint(directory, self._name), needed))
        strategy = _staging_strategy()
        try:
            # Whether each part of each tensor is written once does not change from one save to the next.
            dist_checkpointing.save(
                tensors, str(self._partial(directory)), strategy, validate_access_integrity=not self._layout_checked
            )
            self._layout_checked = True
        except (OSError, RuntimeError) as error:
            # Only rank 0 writes at this point (small state, for which `_find_space` found space). The others wait in a
            # collective that will not come; this error ends the run without them.
            _abandon(self._partial(directory))
            raise CheckpointError(_message(directory, error)) from error
        return strategy.copy_to_host(live, self._copies, self._group)

    def _write(self, directory: Path, commit: Callable[[], None], record: dict[str, Any]) -> None:
        """Make the copies a checkpoint that counts; called by the threads of all ranks together."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            commit()
        except CheckpointException as error:
            # Writers' failures are collected by megatron-core and raised on all ranks, with details on rank 0.
            self._fail_everywhere(directory, error)
        sums = self._checksums_of_all_ranks(self._partial(directory))
        self._on_rank_zero(directory, lambda: self._finish(directory, record, sums))

    def _finish(self, directory: Path, record: dict[str, Any], sums: dict[str, str]) -> None:
        if self._shards is not None:
            (self._partial(directory) / SHARDS).write_text(self._shards, encoding="utf-8")
        finish_checkpoint(directory, record, sums, self._name)
        prune_checkpoints(directory.parent, self._config.keep_last, self._config.keep_every, self._keep_steps)

    def _checksums_of_all_ranks(self, partial: Path) -> dict[str, str]:
        """Checksums by file name; each rank reads back what it wrote itself, which its node still has in memory."""
        own = sorted(partial.glob(f"__{dist.get_rank()}_*.distcp"))
        sums = dict(zip([path.name for path in own], checksums(own), strict=True))
        collected: list[dict[str, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(collected, sums, group=self._group)
        return {name: value for part in collected for name, value in part.items()}

    def _on_rank_zero(self, directory: Path, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; if the file system refuses it, fail on every rank with its message."""
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                problem = [_message(directory, f"rank 0: {error}")]
                _abandon(self._partial(directory))
        dist.broadcast_object_list(problem, src=0, group=self._group)
        if problem[0] is not None:
            raise CheckpointError(problem[0])

    def _fail_everywhere(self, directory: Path, error: Any) -> NoReturn:
        """Raise on all ranks the failures of writes, which rank 0 knows; called by all of them together."""
        causes = {f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items()}
        message = [_message(directory, "; ".join(sorted(causes)))]
        if dist.get_rank() == 0:
            _abandon(self._partial(directory))
        dist.broadcast_object_list(message, src=0, group=self._group)
        raise CheckpointError(message[0]) from error


def _prepare_thread(device: torch.device) -> None:
    """Let this thread take the time that generation on the same cores leaves over; to Linux a thread is a process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    thread = threading.get_native_id()
    if os.getpriority(os.PRIO_PROCESS, thread) < BACKGROUND_NICENESS:
        # Some containers forbid it to everybody. Then checkpoints take as much time as they want.
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, thread, BACKGROUND_NICENESS)


def _staging_strategy() -> Any:
    """megatron-core's torch_dist strategy, whose `save` plans and writes small state, but no tensors yet."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_finalize
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    class StagingStrategy(TorchDistSaveShardedStrategy):
        def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_kind_in_0_19: Any) -> AsyncRequest:
            self.writer, self.planned = writer, planned
            return AsyncRequest(None, (), [])

        def copy_to_host(self, live: set[int], kept: HostCopies, group: dist.ProcessGroup) -> Callable[[], None]:
            """Copy the tensors; the returned function writes them, and the ranks of `group` agree on their index."""
            write, _preload, arguments = self.writer.get_save_function_and_args()
            copies = [] if write is None else [_private(bucket, live, kept) for bucket in self.writer.write_buckets]
            self.writer.write_buckets = copies  # lets go of the policy's own tensors

            def commit() -> None:
                if write is not None:
                    rank, _, results = arguments
                    write(rank, copies, results)
                    copies[:] = [None] * len(copies)  # megatron-core still counts them
                self.planned[2].group = group
                save_state_dict_async_finalize(*self.planned)

            return commit

    return StagingStrategy("torch_dist", 1)


def _storages(tensors: dict[str, Any]) -> set[int]:
    """Addresses of the memory that training goes on changing."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    values = nested_values(tensors)
    data = [value.data for value in values if isinstance(value, ShardedTensor | ShardedTensorFactory)]
    return {tensor.untyped_storage().data_ptr() for tensor in data if tensor is not None}


class HostCopies:
    """Copies of tensors in host memory, in the same memory from one save to the next.

    A new one costs more than its contents: the kernel clears its pages one by one while training waits.
    """

    def __init__(self) -> None:
        self._copies: dict[Hashable, torch.Tensor] = {}

    def copy(self, name: Hashable, tensor: torch.Tensor) -> torch.Tensor:
        """Copy `tensor` to the place of the last copy of this name, which must not be in use any more."""
        copy = self._copies.get(name)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            copy = self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return copy.copy_(tensor)


def _private(bucket: Any, live: set[int], kept: HostCopies) -> Any:
    """One of megatron-core's buckets with its tensors in host memory, and none that training goes on changing.

    megatron-core itself has copied views, and copies from a device into page-locked memory: in allocations of powers of
    two, which the process keeps. Ordinary memory takes a second or two longer and half of the space.
    """
    path, key, (small, tensors) = bucket
    copies = [
        (item, tensor if tensor.untyped_storage().data_ptr() not in live else kept.copy(item.index, tensor))
        for item, tensor in tensors
    ]
    return path, key, (small, copies)


def _bytes_to_write(tensors: dict[str, Any], device: torch.device) -> int:
    """Bytes of all tensors of all ranks, each replicated one once."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    own = sum(
        value.data.nbytes
        for value in nested_values(tensors)
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and is_main_replica(value.replica_id)
    )
    total = torch.tensor(own, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)


def _find_space(partial: Path, needed: int) -> None:
    """Look for space before anything is written, while all ranks can still agree."""
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise OSError(f"{needed / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free on that disk")
    # Quotas and limits of the file size do not show in the free space.
    probe = partial / "probe"
    with probe.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SPACE_MARGIN_BYTES)
    probe.unlink()


def _abandon(partial: Path) -> None:
    """Remove what there is of a checkpoint, as far as it can be removed; the next save tries again."""
    # A folder that has become read-only refuses this, too. The other ranks wait to be told what failed first.
    with suppress(OSError):
        discard(partial)


def _message(directory: Path, cause: object) -> str:
    return f"checkpoint {directory} could not be written: {cause}; earlier checkpoints are complete"
