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
from torch import Tensor

from megatron_entropic.errors import UserError
from megatron_entropic.models.layouts import Shape

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Header of a safetensors file without its metadata, and the fault of the file's size (None: it has none).

    Raises:
        UserError: there is no readable header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise UserError(f"truncated inside its header, or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError("not a safetensors file (its header is not JSON)") from error
    if not isinstance(header, dict):
        raise UserError("not a safetensors file (its header is not a JSON object)")
    header.pop("__metadata__", None)
    problem = _header_problem(header)
    if problem:
        raise UserError(f"damaged header: {problem}")
    expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != expected:
        word = "truncated" if size < expected else "too long"
        return header, f"{word}: {size} bytes, but its header calls for {expected}"
    return header, None


def _header_problem(header: dict[str, Any]) -> str | None:
    """First entry that is not as the format calls for, or leaves gaps or overlaps in the data; None: there is none."""
    end = 0
    for name, tensor in header.items():
        if not isinstance(tensor, dict) or not {"dtype", "shape", "data_offsets"} <= tensor.keys():
            return f"{name}: dtype, shape or data_offsets is missing"
        numbers = (tensor["shape"], tensor["data_offsets"])
        if not all(isinstance(some, list) and all(type(n) is int and n >= 0 for n in some) for some in numbers):
            return f"{name}: shape and data_offsets must be lists of sizes"
        if len(tensor["data_offsets"]) != 2:
            return f"{name}: data_offsets must be two numbers"
        if tensor["dtype"] not in ITEM_BYTES:
            return f"{name}: unknown dtype {tensor['dtype']!r}"
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = tensor["data_offsets"]
        if first != end:
            return f"{name}: data begins at {first}, but what stands before it ends at {end}"
        if last - first != prod(tensor["shape"]) * ITEM_BYTES[tensor["dtype"]]:
            return f"{name}: {last - first} bytes for shape {tensor['shape']} of {tensor['dtype']}"
        end = last
    return None


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
