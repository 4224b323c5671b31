"""Loading of this rank's parameters and buffers from a checkpoint of any kind; each rank reads only its own slices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_entropic.checkpoints.open_weights import open_weights
from megatron_entropic.checkpoints.unusable_tensors import UnusableTensors
from megatron_entropic.errors import RunError
from megatron_entropic.models.adapters import is_adapter
from megatron_entropic.models.parameter_map import Entry, ParameterMap, to_global_name
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.policy.megatron.patches import apply_checkpoint_patches


def named_entries(
    model: torch.nn.ModuleList, parameter_map: ParameterMap, state: ParallelState
) -> Iterator[tuple[Entry, torch.Tensor]]:
    """Yields this rank's parameters with the map's rows for them, and its buffers that a checkpoint holds.

    Adapters, which no checkpoint of a model has, are left out (`adapters.adapter_entries`).

    Args:
        model: the chunks of this rank's stage, not wrapped.
        state: this rank's place.

    Raises:
        KeyError: a parameter that the map does not know.
    """
    first_expert = parameter_map.first_expert(state.expert_rank, state.expert_size)
    stages = state.stage_sizes.of_layers(parameter_map.dimensions.num_layers)
    for index, chunk in enumerate(model):
        first_layer = stages.of_chunk(state.pipeline_rank, index).start
        for name, parameter in chunk.named_parameters():
            if is_adapter(name):
                continue
            yield parameter_map.by_megatron_name(to_global_name(name, first_layer, first_expert)), parameter
        for name, buffer in chunk.named_buffers():
            global_name = to_global_name(name, first_layer)
            if parameter_map.is_buffer(global_name):
                yield parameter_map.by_megatron_name(global_name), buffer


def load_weights(
    model: torch.nn.ModuleList, hf_dir: Path, state: ParallelState, *, megatron_dir: Path | None = None
) -> None:
    """Copy the checkpoint into every parameter and buffer, converting to its dtype; padded rows become zero.

    Args:
        model: the chunks of this rank's stage, not wrapped.
        state: this rank's place.
        megatron_dir: distributed checkpoint with the weights; None: they are in `hf_dir`.

    Raises:
        UserError: the checkpoint is incomplete or does not fit its config.json (see `open_weights`); tensors hold NaN
            or infinite values.
    """
    tensors = open_weights(hf_dir, megatron_dir)
    parameter_map = tensors.parameter_map
    unusable = UnusableTensors()
    with torch.no_grad():
        for entry, parameter in named_entries(model, parameter_map, state):
            rank, size = state.tensor_place(of_expert=entry.expert is not None)
            shard = parameter_map.to_megatron_shard(entry, tensors, rank, size)
            assert shard.shape == parameter.shape, f"{entry.megatron_name}: {shard.shape} for {parameter.shape}"
            unusable.check(" + ".join(entry.hf_names), shard)
            parameter.copy_(shard)
    unusable.raise_if_any(hf_dir if megatron_dir is None else megatron_dir, "not started")


# Fills this rank's parameters from a distributed checkpoint (torch_dist), whatever layout or tool wrote it.

_EXTRA_STATE = "_extra_state"
"""Name of the scales of FP8 layers; a conversion has none, and without them the layers start with their own."""


def load_torch_dist(model: torch.nn.ModuleList, directory: Path) -> None:
    """Read the weights, called by all ranks together; optimizer state in the checkpoint is passed over.

    Args:
        model: the chunks of this rank's stage, not wrapped.
        directory: such as `megatron-entropic convert hf-to-megatron` writes.

    Raises:
        RunError: the checkpoint does not fit the model.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    apply_checkpoint_patches()
    chunks: list[Any] = list(model)
    request = {str(index): _without_extra_state(chunk.sharded_state_dict()) for index, chunk in enumerate(chunks)}
    try:
        loaded = dist_checkpointing.load({"model": request}, str(directory))["model"]
    except (CheckpointException, CheckpointingException, OSError, KeyError, ValueError) as error:
        raise RunError(f"checkpoint {directory} cannot be read into this model: {error}") from error
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[str(index)], strict=False)
        missing = list(_without_extra_state(dict.fromkeys(missing)))
        if missing or unexpected:
            raise RunError(f"checkpoint {directory}: missing {', '.join(missing)}; unexpected {', '.join(unexpected)}")


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.endswith(_EXTRA_STATE)}
