"""megatron-core's distributed checkpoint format (torch_dist), written piece by piece by torch's own checkpoint writer.

No model, process group or full copy in memory is needed: a chunk says where it belongs and how to get its values, and
is forgotten when it is written. Files hold a few GB each and are filled by a pool of threads.

    __N_0.distcp      chunks, each as torch.save writes a tensor
    .metadata         which chunks make up which tensor (torch.distributed.checkpoint)
    metadata.json     names the format for megatron-core
    common.pt         what is not sharded: nothing of a model's weights
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_entropic.checkpoints.pieces import equal_parts
from megatron_entropic.models.layouts import Shape

_FILE_BYTES = 4 * 10**9
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class Stopped(Exception):
    """Another thread has failed; this one ends without a message of its own."""


@dataclass(frozen=True)
class Chunk:
    """A block of a stored tensor."""

    key: str
    shape: Shape
    """Shape of the whole tensor."""
    offsets: Shape
    sizes: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Function that returns the values; called once, in any thread. Their memory is let go when they are written."""

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return prod(self.sizes) * self.dtype.itemsize


def write_torch_dist(directory: Path, chunks: Sequence[Chunk], *, workers: int) -> None:
    """Fill an empty directory with a checkpoint, flushed to disk.

    Args:
        directory: an existing directory.
        chunks: blocks that together cover every tensor exactly once.

    Raises:
        OSError: the disk is full or not writable.
        Exception: the first that a chunk's `read` raised.
    """
    writer = FileSystemWriter(directory, sync_files=True, thread_count=1)
    writer.set_up_storage_writer(is_coordinator=True)
    files = _deal(chunks)
    plans, metadata = create_default_global_save_plan([SavePlan([_write_item(c) for c in file]) for file in files])
    plans = writer.prepare_global_plan(plans)
    planner = _LazyPlanner(chunks)
    with ThreadPoolExecutor(workers, thread_name_prefix="write") as pool:
        futures = [pool.submit(planner.stops_others, writer, plan) for plan in plans]
        try:
            outcomes = [future.exception() for future in futures]
        finally:
            planner.stop()
    problems = [problem for problem in outcomes if problem is not None and not isinstance(problem, Stopped)]
    if problems:
        raise problems[0]
    writer.finish(metadata, [future.result() for future in futures])
    (directory / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
    torch.save({}, directory / "common.pt")


class _LazyPlanner(DefaultSavePlanner):
    """Gives the writer the values of a chunk when it comes to it."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        super().__init__()
        self._chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self._stopping = threading.Event()

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Values of one chunk, in memory of exactly their size (torch.save writes all of a tensor's memory)."""
        if self._stopping.is_set():
            raise Stopped
        assert write_item.index.offset is not None
        chunk = self._chunks[write_item.index.fqn, tuple(write_item.index.offset)]
        values = chunk.read().reshape(chunk.sizes)
        assert values.dtype == chunk.dtype
        return _of_exact_size(values.contiguous())

    def stop(self) -> None:
        """End all threads at their next chunk."""
        self._stopping.set()

    def stops_others(self, writer: FileSystemWriter, plan: SavePlan) -> list:
        """Write one file; whatever goes wrong ends the other threads too."""
        try:
            return writer.write_data(plan, self).wait()
        except BaseException as error:
            self.stop()
            if isinstance(error.__context__, OSError):
                # torch.save ends its archive, which cannot succeed either; the first failure tells what is wrong.
                raise error.__context__ from None
            raise


def _of_exact_size(tensor: Tensor) -> Tensor:
    """A tensor in the same memory, without what lies before and behind it in a memory map or a larger buffer."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    data = tensor.flatten().view(torch.uint8).numpy()
    return torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape)


def _deal(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Chunks in order, dealt to files of about equal size."""
    total = sum(chunk.nbytes for chunk in chunks)
    count = max(1, -(-total // _FILE_BYTES))
    count += count % 2 if count > 1 else 0  # an even number keeps two threads equally busy
    return equal_parts(chunks, count, lambda chunk: chunk.nbytes)


def _write_item(chunk: Chunk) -> WriteItem:
    offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
    properties = TensorProperties(dtype=chunk.dtype)
    data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, torch.Size(chunk.shape))
    return WriteItem(MetadataIndex(chunk.key, offsets), WriteItemType.SHARD, tensor_data=data)
