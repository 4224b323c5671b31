"""Fills this rank's parameters from a distributed checkpoint (torch_dist), whatever layout or tool wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_entropic.errors import RunError
from megatron_entropic.policy.megatron.checkpoint_patches import apply_checkpoint_patches

_EXTRA_STATE = "_extra_state"
"""Scales of FP8 layers; a conversion has none, and without them the layers start with their own."""


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
