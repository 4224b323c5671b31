"""Saving and restoring everything a rank needs to go on: tensors by megatron-core, small state as JSON.

    model, Adam's moments, main parameters      dist_checkpointing (torch_dist, fully_reshardable): any later layout
    RNG of each rank                            the same, restored where the number of ranks is the same
    controller, counters, the driver's state    state.json (checkpoint_files)

A save ends either with a complete directory in place or with one error; older checkpoints are not touched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megatron_entropic.policy.checkpoint_files import (
    CheckpointError,
    begin_checkpoint,
    checkpoint_path,
    checksums,
    complete_checkpoints,
    discard,
    finish_checkpoint,
    latest_checkpoint,
    partial_path,
    prune_checkpoints,
    read_state,
)
from megatron_entropic.policy.checkpoint_patches import apply_checkpoint_patches
from megatron_entropic.policy.optimizer import PolicyOptimizer

__all__ = [
    "CheckpointError",
    "checkpoint_path",
    "complete_checkpoints",
    "latest_checkpoint",
    "load_checkpoint",
    "prune_checkpoints",
    "read_state",
    "save_checkpoint",
]

SPACE_MARGIN_BYTES = 32 * 2**20
"""Free space asked for beyond the tensors: metadata and small state."""


def save_checkpoint(
    directory: Path,
    model: torch.nn.ModuleList,
    optimizer: PolicyOptimizer,
    state: dict[str, Any],
    *,
    keep_last: int,
    keep_every: int = 0,
) -> None:
    """Write a checkpoint, called by all ranks together.

    Args:
        directory: where the complete checkpoint will be, on a file system that all ranks share; see `checkpoint_path`.
        model: the chunks of this rank's stage, not wrapped.
        optimizer: its optimizer; its parameters must be synchronised.
        state: JSON, the same on every rank; rank 0's is written.
        keep_last: complete checkpoints to keep beside `directory`, this one included.
        keep_every: checkpoints of steps it divides are kept for ever; 0: none.

    Raises:
        CheckpointError: it could not be written, for instance for want of space. The partial directory is removed.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    apply_checkpoint_patches()
    record = {"state": state, "ranks": dist.get_world_size(), "schedule_steps": optimizer.steps_taken}
    json.dumps(record)  # what is not JSON fails here, on all ranks
    tensors = _sharded_state(model, optimizer, loading=False)
    needed = _bytes_to_write(tensors, next(model.parameters()).device) + SPACE_MARGIN_BYTES
    _on_rank_zero(directory, lambda: _begin(directory, needed))
    try:
        dist_checkpointing.save(tensors, str(partial_path(directory)))
    except CheckpointException as error:
        # Writers' failures are collected by megatron-core and raised on all ranks, with details on rank 0.
        _fail_everywhere(directory, error)
    except (OSError, RuntimeError) as error:
        # Only rank 0 writes outside the collected part (metadata, for which `_begin` found space). The others wait in a
        # collective that will not come; this error ends the run without them.
        discard(partial_path(directory))
        raise CheckpointError(_message(directory, error)) from error
    sums = _checksums_of_all_ranks(partial_path(directory))
    _on_rank_zero(directory, lambda: finish_checkpoint(directory, record, sums))
    _on_rank_zero(directory, lambda: prune_checkpoints(directory.parent, keep_last, keep_every))


def load_checkpoint(directory: Path, model: torch.nn.ModuleList, optimizer: PolicyOptimizer) -> dict[str, Any]:
    """Restore a checkpoint into a model and optimizer of any layout, called by all ranks together.

    Args:
        directory: a complete checkpoint.
        model: the chunks of this rank's stage, not wrapped.
        optimizer: its optimizer, with the schedule of the current configuration.

    Returns:
        The state given to `save_checkpoint`.

    Raises:
        CheckpointError: not a complete checkpoint, or it does not fit the model.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    apply_checkpoint_patches()
    saved = read_state(directory)
    same_ranks = saved["ranks"] == dist.get_world_size()
    request = _sharded_state(model, optimizer, loading=True)
    if not same_ranks:
        del request["rng"]
    try:
        loaded = dist_checkpointing.load(request, str(directory))
    except (CheckpointException, CheckpointingException, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory} cannot be read into this model: {error}") from error
    for index, chunk in enumerate(model):
        chunk.load_state_dict(loaded["model"][str(index)], strict=True)
    optimizer.load_state_dict(loaded["optimizer"], steps_taken=saved["schedule_steps"])
    if same_ranks:
        _set_rng_state(loaded["rng"])
    return saved["state"]


def _sharded_state(model: torch.nn.ModuleList, optimizer: PolicyOptimizer, *, loading: bool) -> dict[str, Any]:
    """What dist_checkpointing saves or fills, with this rank's place in every global tensor."""
    from megatron.core.dist_checkpointing import ShardedObject

    # Names in the file count layers over the whole model; where a chunk stands in this tree does not matter.
    chunks: list[Any] = list(model)
    model_state = {str(index): chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, loading=loading),
        "rng": ShardedObject("rng", _rng_state(model), (dist.get_world_size(),), (dist.get_rank(),)),
    }


def _rng_state(model: torch.nn.ModuleList) -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    device = next(model.parameters()).device
    return {
        "host": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(state["host"])
    if state["device"] is not None:
        torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])


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


def _checksums_of_all_ranks(partial: Path) -> dict[str, str]:
    """By file name; each rank reads back what it wrote itself, which its node still has in memory."""
    own = sorted(partial.glob(f"__{dist.get_rank()}_*.distcp"))
    sums = dict(zip([path.name for path in own], checksums(own), strict=True))
    collected: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(collected, sums)
    return {name: value for part in collected for name, value in part.items()}


def _begin(directory: Path, needed: int) -> None:
    """Create the partial folder and look for space before anything is written, while all ranks can still agree."""
    partial = begin_checkpoint(directory)
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise OSError(f"{needed / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free on that disk")
    # Quotas and limits of the file size do not show in the free space.
    probe = partial / "probe"
    with probe.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SPACE_MARGIN_BYTES)
    probe.unlink()


def _on_rank_zero(directory: Path, action: Callable[[], None]) -> None:
    """Run `action` on rank 0; if the file system refuses it, fail on every rank with its message."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = [_message(directory, error)]
            discard(partial_path(directory))
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise CheckpointError(problem[0])


def _fail_everywhere(directory: Path, error: Any) -> NoReturn:
    """All ranks are here; rank 0 knows which writes failed."""
    causes = {f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items()}
    message = [_message(directory, "; ".join(sorted(causes)))]
    if dist.get_rank() == 0:
        discard(partial_path(directory))
    dist.broadcast_object_list(message, src=0)
    raise CheckpointError(message[0]) from error


def _message(directory: Path, cause: object) -> str:
    return f"checkpoint {directory} could not be written: {cause}; earlier checkpoints are complete"
