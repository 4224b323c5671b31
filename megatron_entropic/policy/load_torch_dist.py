"""Fills this rank's parameters from a distributed checkpoint (torch_dist), whatever layout or tool wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_entropic.errors import RunError
from megatron_entropic.policy.checkpoint_patches import apply_checkpoint_patches

if TYPE_CHECKING:
    from megatron_entropic.policy.model import PolicyModel

_EXTRA_STATE = "_extra_state"
"""Scales of FP8 layers; a conversion has none, and without them the layers start with their own."""


def load_torch_dist(model: PolicyModel, directory: Path) -> None:
    """Read the weights, called by all ranks together; optimizer state in the checkpoint is passed over.

    Args:
        model: this rank's stage, not wrapped.
        directory: such as `tools/checkpoint_convert/hf_to_megatron.py` writes.

    Raises:
        RunError: the checkpoint does not fit the model.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    apply_checkpoint_patches()
    request = {name: value for name, value in model.sharded_state_dict().items() if not name.endswith(_EXTRA_STATE)}
    try:
        loaded = dist_checkpointing.load({"model": request}, str(directory))["model"]
    except (CheckpointException, CheckpointingException, OSError, KeyError, ValueError) as error:
        raise RunError(f"checkpoint {directory} cannot be read into this model: {error}") from error
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    missing = [name for name in missing if not name.endswith(_EXTRA_STATE)]
    if missing or unexpected:
        raise RunError(f"checkpoint {directory}: missing {', '.join(missing)}; unexpected {', '.join(unexpected)}")
