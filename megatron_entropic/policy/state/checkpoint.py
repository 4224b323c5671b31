"""Everything a rank needs to go on, and restoring it: tensors by megatron-core, small state as JSON.

    model                                       dist_checkpointing (torch_dist): any later layout
    Adam's moments, main parameters             the same, as the ranks' shards (`optimizer_shards`) or whole
    RNG of each rank                            the same, restored where the number of ranks is the same
    controller, counters, the driver's state    state.json (run_checkpoints)

`checkpoint_writer` saves it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_entropic.checkpoints.run_checkpoints import (
    CheckpointError,
    check_only_data,
    checkpoint_path,
    complete_checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    read_state,
)
from megatron_entropic.policy.megatron.patches import apply_checkpoint_patches
from megatron_entropic.policy.step.optimizer import Format, PolicyOptimizer
from megatron_entropic.policy.step.optimizer_shards import Shards

__all__ = [
    "CheckpointError",
    "checkpoint_path",
    "complete_checkpoints",
    "latest_checkpoint",
    "load_checkpoint",
    "prune_checkpoints",
    "read_state",
    "sharded_state",
]


def load_checkpoint(directory: Path, model: torch.nn.ModuleList, optimizer: PolicyOptimizer) -> dict[str, Any]:
    """Restore a checkpoint into a model and optimizer of any layout, called by all ranks together.

    Args:
        directory: a complete checkpoint.
        model: the chunks of this rank's stage, not wrapped.
        optimizer: its optimizer, with the schedule of the current configuration.

    Returns:
        The state given to `CheckpointWriter.save`.

    Raises:
        CheckpointError: not a complete checkpoint, one that holds more than data, or it does not fit the model.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    apply_checkpoint_patches()
    saved = read_state(directory)
    check_only_data(directory)
    same_ranks = saved["ranks"] == dist.get_world_size()
    request = sharded_state(model)
    if not same_ranks:
        del request["rng"]
    shards = Shards.read(directory)
    fitting = shards is None or optimizer.shards(request["model"]) == shards
    if fitting:
        format: Format = "fully_reshardable" if shards is None else "dp_reshardable"
        request["optimizer"] = optimizer.sharded_state_dict(request["model"], loading=True, format=format)
    try:
        loaded = dist_checkpointing.load(request, str(directory))
        if not fitting:
            assert shards is not None
            loaded["optimizer"] = optimizer.read_shards(directory, shards, sharded_state(model)["model"])
    except (CheckpointException, CheckpointingException, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory} cannot be read into this model: {error}") from error
    for index, chunk in enumerate(model):
        # With adapters only theirs are there: the weights were read where the run began, and have not changed.
        chunk.load_state_dict(loaded["model"][str(index)], strict=not _has_frozen(chunk))
    optimizer.load_state_dict(loaded["optimizer"], steps_taken=saved["schedule_steps"])
    if same_ranks:
        _set_rng_state(loaded["rng"])
    return saved["state"]


def sharded_state(model: torch.nn.ModuleList) -> dict[str, Any]:
    """State of model and generators that dist_checkpointing saves or fills, with this rank's place in global tensors.

    Of a model with adapters it is theirs alone: every run reads the weights, which do not change, where it began.

    Args:
        model: the chunks of this rank's stage, not wrapped.
    """
    from megatron.core.dist_checkpointing import ShardedObject

    # Names in the file count layers over the whole model; where a chunk stands in this tree does not matter.
    chunks: list[Any] = list(model)
    return {
        "model": {str(index): _trained(chunk, chunk.sharded_state_dict()) for index, chunk in enumerate(chunks)},
        "rng": ShardedObject("rng", _rng_state(model), (dist.get_world_size(),), (dist.get_rank(),)),
    }


def _has_frozen(chunk: torch.nn.Module) -> bool:
    return not all(parameter.requires_grad for parameter in chunk.parameters())


def _trained(chunk: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The part of a chunk's sharded state that training changes: of parameters, and scales of 8-bit layers."""
    if not _has_frozen(chunk):
        return state
    trained = {id(parameter) for parameter in chunk.parameters() if parameter.requires_grad}
    return {
        name: value
        for name, value in state.items()
        if id(getattr(value, "data", None)) in trained or name.endswith("_extra_state")
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
