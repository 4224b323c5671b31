"""The pickled `.metadata` of a distributed checkpoint, read without calling anything that it names.

A pickle is a program that calls what it names. Here every (module, name) pair that may stand in one is written down,
and for each the unpickler gets a stand-in that keeps what it is called with: nothing of torch, of this package or of
Python itself can be reached, called or changed by a file, whoever wrote it. Names with dots, which pickle would follow
from attribute to attribute, are in no list.

    .metadata -> _Unpickler -> stand-ins (_Record) -> CheckpointMetadata, every field checked

Enums are pickled as a call of their class (`WriteItemType(2)`) or, by Python 3.11.0 to 3.11.2, as a call of `getattr`
(`getattr(WriteItemType, "TENSOR")`). Both are understood.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

import torch

from megatron_entropic.errors import UserError
from megatron_entropic.models.layouts import Shape

_DCP = "torch.distributed.checkpoint."
_RECORDS = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13
        (_DCP + "filesystem", "_StorageInfo"),
        (_DCP + "metadata", "BytesStorageMetadata"),
        (_DCP + "metadata", "ChunkStorageMetadata"),
        (_DCP + "metadata", "Metadata"),
        (_DCP + "metadata", "MetadataIndex"),
        (_DCP + "metadata", "StorageMeta"),
        (_DCP + "metadata", "TensorProperties"),
        (_DCP + "metadata", "TensorStorageMetadata"),
        # megatron-core keeps the plans of all ranks beside the metadata.
        (_DCP + "planner", "BytesIOWriteData"),
        (_DCP + "planner", "SavePlan"),
        (_DCP + "planner", "TensorWriteData"),
        (_DCP + "planner", "WriteItem"),
    }
)
_ENUMS = {
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"): frozenset(
        {"TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT"}
    ),
    (_DCP + "planner", "WriteItemType"): frozenset({"TENSOR", "SHARD", "BYTE_IO"}),
}
_GETATTR = ("builtins", "getattr")
_DTYPES = {
    name: value for name in dir(torch) if isinstance(value := getattr(torch, name), torch.dtype) and "." not in name
}
_FORMAT_VERSION = 1
"""Leading number of `Metadata.version` that is understood; files of older torch have no version."""

UNREADABLE = (
    *(ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError, RuntimeError, TypeError),
    *(pickle.UnpicklingError, ValueError),
)
"""Exceptions that reading a pickle with wrong bytes in it raises."""


@dataclass
class DescribedTensor:
    """A stored tensor by its metadata."""

    shape: Shape
    dtype: torch.dtype
    chunks: dict[Shape, Shape] = field(default_factory=dict)
    """Blocks of the tensor: offsets -> sizes, in elements."""


@dataclass(frozen=True)
class StoredPlace:
    """The part of a file that holds a block of a tensor, or an object; `start` and `length` in bytes."""

    name: str
    offsets: Shape | None
    """Offsets of the block in its tensor; None for objects, and for tensors that were not cut."""
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class CheckpointMetadata:
    """Tensors and objects that a checkpoint holds, and their places in its files."""

    tensors: dict[str, DescribedTensor]
    objects: frozenset[str]
    """Names of everything that is not a tensor."""
    places: tuple[StoredPlace, ...]


def read_checkpoint_metadata(path: Path, *, only_known: bool = False) -> CheckpointMetadata:
    """Read a `.metadata` file.

    Args:
        only_known: refuse names that are not in the lists above. Reading here is safe either way, because they are
            ignored; but another reader (torch's own) would call them.

    Raises:
        UserError: the file cannot be understood, or holds what it must not.
        OSError: it cannot be read.
    """
    unpickler = _Unpickler(path.read_bytes(), only_known=only_known)
    try:
        return _interpret(unpickler.load())
    except _ForeignName as error:
        raise UserError(
            f"{path}: not loaded: it calls for {error}, which no checkpoint of this kind needs. The file may have been "
            "made to run a command; use a checkpoint from a source you trust"
        ) from error
    except _NewerFormat as error:
        raise UserError(f"{path}: {error}") from error
    except UNREADABLE as error:
        called = f"; it calls for {', '.join(unpickler.ignored[:3])}, which is never done" if unpickler.ignored else ""
        raise UserError(f"{path}: damaged, or of an unknown kind: {error!r}{called}") from error


class _ForeignName(Exception):
    """A name in a pickle that is in no list."""


class _NewerFormat(Exception):
    """The file is of a later version of its format."""


class _Record:
    """Keeps what an object was made of; whatever is done to the class itself is refused."""

    kind: tuple[str, str] = ("", "")
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any, **_named: Any) -> Self:
        """Keep the arguments; pickle calls this with `__init__` or without, as it pleases."""
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        """Do nothing: `__new__` has kept the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Keep an object's state. Called on a class it lacks an argument (TypeError): nothing can be set on a class."""
        self.state = state


class _Ignored(_Record, dict):
    """Stands for an object of an unknown class; what is put into it is forgotten."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Forget an item, which a dictionary would keep."""

    def append(self, _value: Any) -> None:
        """Forget a value, which a list would keep."""

    def extend(self, _values: Any) -> None:
        """Forget values, which a list would keep."""

    def add(self, _value: Any) -> None:
        """Forget a value, which a set would keep."""


class _GetAttribute(_Record):
    """Stands for `getattr`, of which only members of the enums are asked."""

    def __new__(cls, owner: Any, member: Any) -> Self:
        """Refuse anything but a member of an enum, or of an unknown class."""
        kind = owner.kind if isinstance(owner, type) and issubclass(owner, _Record) else ("", "")
        if owner is not _Ignored and member not in _ENUMS.get(kind, ()):
            raise _ForeignName(f"builtins.getattr for {member!r}")
        return super().__new__(cls, owner, member)


class _Unpickler(pickle.Unpickler):
    """Makes stand-ins of all objects; their classes are made anew for each file."""

    def __init__(self, data: bytes, *, only_known: bool) -> None:
        super().__init__(io.BytesIO(data))
        self._only_known = only_known
        self.ignored: list[str] = []
        """Names without a stand-in, as they came in the file."""
        self._classes: dict[tuple[str, str], type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name; `_Ignored` if it is in no list."""
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        kind = (module, name)
        if kind == _GETATTR:
            return _GetAttribute
        if kind not in _RECORDS and kind not in _ENUMS:
            if self._only_known:
                raise _ForeignName(f"{module}.{name}")
            self.ignored.append(f"{module}.{name}")
            return _Ignored
        if kind not in self._classes:
            self._classes[kind] = type(name, (_Record,), {"kind": kind})
        return self._classes[kind]


def _interpret(root: Any) -> CheckpointMetadata:
    """Turn stand-ins into the tensors, objects and places that they describe.

    Raises:
        TypeError, ValueError, KeyError: they describe no checkpoint.
        _NewerFormat: a later version of the format.
    """
    top = _fields(root, "metadata", "Metadata")
    version = top.get("version")
    if isinstance(version, str) and version.split(".")[0].isdecimal() and int(version.split(".")[0]) > _FORMAT_VERSION:
        raise _NewerFormat(
            f"format version {version} of torch.distributed.checkpoint is newer than this version of megatron_entropic "
            f"reads ({_FORMAT_VERSION}); save it with an older torch, or convert it to Hugging Face's format with the "
            "software that wrote it"
        )
    described, storage = top["state_dict_metadata"], top["storage_data"]
    if not isinstance(described, dict) or not isinstance(storage, dict):
        raise TypeError("it lists no tensors, or not where they lie")
    tensors: dict[str, DescribedTensor] = {}
    objects = set()
    for name, stored in described.items():
        if _kind(stored) == (_DCP + "metadata", "BytesStorageMetadata"):
            objects.add(_text(name))
        elif isinstance(stored, _Ignored):
            continue
        else:
            tensors[_text(name)] = _tensor(_fields(stored, "metadata", "TensorStorageMetadata"))
    return CheckpointMetadata(tensors, frozenset(objects), tuple(_place(i, where) for i, where in storage.items()))


def _tensor(fields: Mapping[str, Any]) -> DescribedTensor:
    properties = fields["properties"]
    _require_kind(properties, "metadata", "TensorProperties")
    dtype = properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"a tensor's dtype is {type(dtype).__name__}")
    chunks = [_fields(chunk, "metadata", "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return DescribedTensor(
        _sizes(fields["size"]), dtype, {_sizes(chunk["offsets"]): _sizes(chunk["sizes"]) for chunk in chunks}
    )


def _place(index: Any, where: Any) -> StoredPlace:
    key = _fields(index, "metadata", "MetadataIndex")
    info = _fields(where, "filesystem", "_StorageInfo")
    file, start, length = _text(info["relative_path"]), info["offset"], info["length"]
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise ValueError(f"{file!r} lies outside the checkpoint")
    if type(start) is not int or type(length) is not int or start < 0 or length < 0:
        raise ValueError(f"bytes {start!r} to {start!r} + {length!r} of {file}")
    if info.get("transform_descriptors"):
        raise _NewerFormat(
            f"its files are transformed by {info['transform_descriptors']!r}; save it without compression"
        )
    offsets = key.get("offset")
    return StoredPlace(_text(key["fqn"]), None if offsets is None else _sizes(offsets), file, start, length)


def _kind(value: Any) -> tuple[str, str]:
    if isinstance(value, _Ignored):
        return "", "an object of an unknown class"
    return value.kind if isinstance(value, _Record) else ("", type(value).__name__)


def _require_kind(value: Any, module: str, name: str) -> None:
    if _kind(value) != (_DCP + module, name):
        raise TypeError(f"{'.'.join(_kind(value)).strip('.')} where {name} should be")


def _fields(value: Any, module: str, name: str) -> dict[str, Any]:
    """Fields of a dataclass of torch's, by name; those that were not saved have their defaults there."""
    _require_kind(value, module, name)
    state = value.state
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        state = state[1]  # of a class with slots
    if not isinstance(state, dict):
        raise TypeError(f"{name} has no fields")
    return state


def _sizes(value: Any) -> Shape:
    """Numbers of a stand-in for torch.Size."""
    if _kind(value) == ("torch", "Size"):
        value = value.arguments[0] if value.arguments else ()
    if not isinstance(value, tuple | list) or not all(type(n) is int and n >= 0 for n in value):
        raise TypeError(f"{value!r} where sizes should be")
    return tuple(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a name should be")
    return value
