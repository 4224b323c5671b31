"""Dtype and place of the values of a tensor that torch.save wrote, found without reading them.

It is an uncompressed zip archive with a pickled description (data.pkl) and the values (data/0). The description is read
with stand-ins for the functions that would build the tensor; nothing else in it is called.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from megatron_entropic.checkpoints.checkpoint_pickle import UNREADABLE
from megatron_entropic.models.layouts import Shape

_LOCAL_HEADER_BYTES = 30
_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
}


class DamagedTensor(ValueError):
    """Error of bytes that are not a saved tensor of the expected kind."""


@dataclass(frozen=True)
class _Description:
    """Dtype, size and layout that a pickled tensor says it has; offset and strides in elements."""

    dtype: torch.dtype
    offset: int
    size: Shape
    strides: Shape

    @property
    def is_plausible(self) -> bool:
        """Whether everything is of its type; a damaged pickle may have put anything in any place."""
        numbers = (self.offset, *self.size, *self.strides)
        counts = all(type(n) is int and n >= 0 for n in numbers) and len(self.size) == len(self.strides)
        return counts and isinstance(self.dtype, torch.dtype)

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether this is a contiguous tensor of these sizes."""
        strides, step = [], 1
        for length in reversed(self.size):
            strides.append(step)
            step *= length
        alike = (n == 1 or a == b for n, a, b in zip(self.size, self.strides, reversed(strides), strict=True))
        return self.size == tuple(sizes) and all(alike)


class _TensorUnpickler(pickle.Unpickler):
    """Reads the description of one tensor without making it."""

    def find_class(self, module: str, name: str) -> Any:
        """Stand-ins for the functions that would build the tensor."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, strides, *_: _Description(storage, offset, tuple(size), tuple(strides))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a plain tensor")

    def persistent_load(self, pid: Any) -> torch.dtype:
        """Dtype of the storage; its type is all that is not in the archive itself."""
        dtype: torch.dtype = pid[1]
        return dtype


def find_values(data: mmap.mmap, start: int, length: int, sizes: Shape) -> tuple[int, torch.dtype]:
    """Position of the values of a contiguous tensor of `sizes` that was saved to `data`, and their dtype.

    Args:
        data: map of a whole file.
        start, length: place of what torch.save wrote, in bytes.
        sizes: shape that the tensor must have.

    Raises:
        DamagedTensor: it is not such a tensor.
    """
    try:
        position, tensor = _open_archive(data, start, length)
    except (*UNREADABLE, zipfile.BadZipFile, struct.error) as error:
        raise DamagedTensor(str(error) or repr(error)) from error
    if not tensor.fits(sizes):
        raise DamagedTensor(f"it holds {list(tensor.size)}, its metadata says {list(sizes)}")
    return position + tensor.offset * tensor.dtype.itemsize, tensor.dtype


def _open_archive(data: mmap.mmap, start: int, length: int) -> tuple[int, _Description]:
    """Position in `data` of the stored values, and the tensor's description."""
    with zipfile.ZipFile(_Slice(data, start, length)) as archive:
        names = archive.namelist()
        description = next((name for name in names if name.endswith("/data.pkl")), "data.pkl")
        values = archive.getinfo(description.removesuffix("data.pkl") + "data/0")
        if {values.compress_type, archive.getinfo(description).compress_type} != {zipfile.ZIP_STORED}:
            raise DamagedTensor("it is compressed")
        tensor = _TensorUnpickler(io.BytesIO(archive.read(description))).load()
    if not isinstance(tensor, _Description) or not tensor.is_plausible:
        raise DamagedTensor("it is not a tensor")
    header = start + values.header_offset
    name_bytes, extra_bytes = struct.unpack_from("<HH", data, header + _LOCAL_HEADER_BYTES - 4)
    position = header + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if position + values.file_size > start + length:
        raise DamagedTensor("its values end behind it")
    if (tensor.offset + prod(tensor.size)) * tensor.dtype.itemsize > values.file_size:
        raise DamagedTensor("it has fewer values than its shape calls for")
    return position, tensor


class _Slice(io.RawIOBase):
    """A part of a memory map as a file of its own."""

    def __init__(self, data: mmap.mmap, start: int, length: int) -> None:
        super().__init__()
        self._data, self._start, self._length = data, start, length
        self._position = 0

    def seekable(self) -> bool:
        """Whether the file can be sought in: always."""
        return True

    def readable(self) -> bool:
        """Whether the file can be read: always."""
        return True

    def tell(self) -> int:
        """Position in the slice, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position, as in any file; returns the new one."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if self._position < 0:
            raise ValueError("seek before the start")
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Read at most `size` bytes; all that are left if it is None or negative."""
        left = max(0, self._length - self._position)
        count = left if size is None or size < 0 else min(size, left)
        first = self._start + self._position
        self._position += count
        return self._data[first : first + count]
