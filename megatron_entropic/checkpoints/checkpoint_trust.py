"""Whether a checkpoint is data alone, found before megatron-core loads it.

Loading it runs pickles without limits: torch reads `.metadata` with `pickle.load` and every object that is no tensor
(random state, extra state of layers) with `torch.load(weights_only=False)`. Whoever can put a folder into a run's
output_dir could run commands so; a checkpoint that a colleague or a download provided is such a folder. `common.pt` is
loaded by megatron-core with weights only.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_entropic.checkpoints.checkpoint_pickle import StoredPlace, read_checkpoint_metadata
from megatron_entropic.checkpoints.run_checkpoints import CheckpointError
from megatron_entropic.errors import UserError

_EXTRA_STATE = "._extra_state"


def check_only_data(directory: Path) -> None:
    """Refuse a checkpoint of which anything but tensors, numbers and texts would be made.

    Raises:
        CheckpointError: naming the file and what it holds; or it cannot be read.
    """
    try:
        metadata = read_checkpoint_metadata(directory / ".metadata", only_known=True)
        if (directory / "common.pt").is_file():
            _load_data(directory / "common.pt", (directory / "common.pt").read_bytes(), "its contents")
        for place in metadata.places:
            if place.name in metadata.objects:
                _check_object(directory, place)
    except (OSError, UserError) as error:
        raise CheckpointError(f"checkpoint {directory} is not loaded: {error}") from error


def _check_object(directory: Path, place: StoredPlace) -> None:
    path = directory / place.file
    with path.open("rb") as file:
        file.seek(place.start)
        value = _load_data(path, file.read(place.length), place.name)
    # Transformer Engine's layers unpickle their extra state themselves; without FP8 it is empty.
    if _EXTRA_STATE in place.name and not _is_empty(value):
        raise UserError(f"{path}: {place.name} is not empty: a layer's own state (of FP8) is not supported")


def _load_data(path: Path, data: bytes, name: str) -> Any:
    """What is saved there, if torch makes it without calling anything.

    Raises:
        UserError: it is more than data, or damaged.
    """
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        reason = str(error).split("\n\n")[0]
        raise UserError(
            f"{path}: {name} cannot be loaded as mere data; use only checkpoints of your own: {reason}"
        ) from error


def _is_empty(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 0
    if isinstance(value, io.BytesIO):
        return not value.getvalue()
    # megatron-core wraps an object in a list of one.
    return value is None or (isinstance(value, list | tuple) and all(_is_empty(item) for item in value))
