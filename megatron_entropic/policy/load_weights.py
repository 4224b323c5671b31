"""Fills this rank's parameters and buffers from a Hugging Face directory; each rank reads only its own slices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_entropic.policy.parallel import ParallelState
from megatron_entropic.weights.hf_io import HfReader
from megatron_entropic.weights.parameter_map import Entry, ParameterMap, to_global_name


def named_entries(
    model: torch.nn.ModuleList, parameter_map: ParameterMap, state: ParallelState
) -> Iterator[tuple[Entry, torch.Tensor]]:
    """This rank's parameters with the map's rows for them, and its buffers that a checkpoint holds.

    Args:
        model: The chunks of this rank's stage, not wrapped.

    Raises:
        KeyError: a parameter that the map does not know.
    """
    first_expert = parameter_map.first_expert(state.expert_rank, state.expert_size)
    for index, chunk in enumerate(model):
        first_layer = parameter_map.first_layer(state.pipeline_rank, state.pipeline_size, index, state.virtual_size)
        for name, parameter in chunk.named_parameters():
            yield parameter_map.by_megatron_name(to_global_name(name, first_layer, first_expert)), parameter
        for name, buffer in chunk.named_buffers():
            global_name = to_global_name(name, first_layer)
            if parameter_map.is_buffer(global_name):
                yield parameter_map.by_megatron_name(global_name), buffer


def load_weights(model: torch.nn.ModuleList, hf_dir: Path, state: ParallelState) -> None:
    """Copies the checkpoint into every parameter and buffer, converting to its dtype; padded rows become zero.

    Raises:
        ValueError: the checkpoint is incomplete or does not fit its config.json (see `HfReader`).
    """
    reader = HfReader(hf_dir)
    parameter_map = reader.parameter_map
    with torch.no_grad():
        for entry, parameter in named_entries(model, parameter_map, state):
            rank, size = state.tensor_place(of_expert=entry.expert is not None)
            shard = parameter_map.to_megatron_shard(entry, reader, rank, size)
            assert shard.shape == parameter.shape, f"{entry.megatron_name}: {shard.shape} for {parameter.shape}"
            parameter.copy_(shard)
