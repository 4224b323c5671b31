"""The safetensors container: headers read without reading data, files filled tensor by tensor in any order.

Format: 8 bytes little-endian header length, JSON header (name -> dtype, shape, data_offsets; and __metadata__), data
without gaps. The header comes first, so a writer that knows all shapes beforehand needs one tensor in memory at a time.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_entropic.errors import UserError
from megatron_entropic.models.layouts import Shape

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def read_header(path: Path) -> dict[str, tuple[str, Shape]]:
    """Dtype, as safetensors spells it, and shape of every tensor in a file.

    Raises:
        UserError: the header cannot be read, or the data is not what it calls for.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  the file is no mapping
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise UserError(_damage(path) or f"damaged header: {error}") from error


def _damage(path: Path) -> str:
    """Words for a file that is too short or too long, or no safetensors file at all; else none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            return f"truncated inside its header, or not a safetensors file ({size} bytes)"
        try:
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except ValueError:
            return "not a safetensors file (its header is not JSON)"
        except (AttributeError, LookupError, TypeError):
            return ""
    if size == expected:
        return ""
    return f"{'truncated' if size < expected else 'too long'}: {size} bytes, but its header calls for {expected}"


class SafetensorsWriter:
    """One safetensors file whose tensors are announced at first and written one by one, in any order."""

    def __init__(self, path: Path, shapes: dict[str, Shape], dtypes: Mapping[str, torch.dtype]) -> None:
        """Create the file with its header; `shapes` fixes names and order, `dtypes` may know more names.

        Raises:
            ValueError: a dtype that Hugging Face checkpoints of these models do not use.
        """
        for dtype in {dtypes[name] for name in shapes}:
            if dtype not in DTYPE_NAMES:
                raise ValueError(f"cannot write tensors of {dtype}; supported: {', '.join(map(str, DTYPE_NAMES))}")
        self.path = path
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            dtype = dtypes[name]
            end = offset + prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._positions = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in shapes}
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)

    def write(self, name: str, tensor: Tensor, first_row: int = 0) -> None:
        """Write one announced tensor, or a run of its rows; shape and dtype must be as announced (the caller checks).

        Several threads may write at once.
        """
        flat = tensor.detach().to("cpu").contiguous().flatten()
        data = flat.view(torch.uint8).numpy()
        row_bytes = data.nbytes // tensor.shape[0]
        with self.path.open("r+b") as file:
            file.seek(self._positions[name] + first_row * row_bytes)
            file.write(data.data)
