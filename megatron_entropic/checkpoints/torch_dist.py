"""Distributed checkpoints (torch_dist) read through memory maps, as megatron-core or `torch_dist_writer` wrote them.

Values stay in the map until they are used, so reading a checkpoint takes no memory of its own. What is pickled in it is
read by `checkpoint_pickle` and `saved_tensor`, which call nothing that it names.
"""

from __future__ import annotations

import json
import mmap
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_entropic.checkpoints.checkpoint_pickle import UNREADABLE, CheckpointMetadata, read_checkpoint_metadata
from megatron_entropic.checkpoints.saved_tensor import DamagedTensor, find_values
from megatron_entropic.errors import UserError
from megatron_entropic.models.dimensions import ModelDimensions
from megatron_entropic.models.layouts import Shape
from megatron_entropic.models.parameter_map import Entry

_FORMAT_VERSION = 1
"""Version of megatron-core's torch_dist format, in metadata.json."""


@dataclass(frozen=True)
class _Chunk:
    """A stored block of a tensor and the part of a file that holds it."""

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    length: int


@dataclass
class StoredTensor:
    """A tensor of the checkpoint, by its metadata."""

    shape: Shape
    dtype: torch.dtype
    chunks: list[_Chunk] = field(default_factory=list)
    """Chunks in the order of their first offsets."""

    def near(self, first: int, count: int) -> list[_Chunk]:
        """Chunks that may hold some of the `count` rows from `first` on; there may be very many others."""
        longest = max(chunk.sizes[0] for chunk in self.chunks)
        low = bisect_left(self.chunks, first - longest + 1, key=lambda chunk: chunk.offsets[0])
        return self.chunks[low : bisect_left(self.chunks, first + count, key=lambda chunk: chunk.offsets[0])]


class TorchDistReader:
    """The tensors of a distributed checkpoint by name. Opening it reads metadata and looks at the sizes of files.

    Raises:
        UserError: not such a checkpoint, or one error that lists every missing or truncated file and every tensor that
            is not completely there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._maps: dict[str, mmap.mmap] = {}
        self.tensors: dict[str, StoredTensor] = {}
        metadata = _read_metadata(self.directory)
        try:
            self._find_tensors(metadata)
            problems = [*self._file_problems(), *self._coverage_problems()]
        except UNREADABLE as error:
            raise UserError(f"{self.directory / '.metadata'}: damaged: {error!r}") from error
        if problems:
            raise UserError(f"{self.directory}: the checkpoint is damaged:\n" + "\n".join(f"  - {p}" for p in problems))

    def read(self, name: str, offsets: Shape, sizes: Shape) -> Tensor:
        """A block of a tensor: a view of the map (copy it, never write to it), or a copy where several chunks meet.

        Raises:
            KeyError: no such tensor.
            UserError: a chunk is not what the metadata says.
        """
        stored = self.tensors[name]
        result: Tensor | None = None
        for chunk in stored.near(offsets[0], sizes[0]):
            common = _intersection(chunk, offsets, sizes)
            if common is None:
                continue
            begin, extent = common
            values = self._map(name, stored, chunk)
            for axis, (first, origin, length) in enumerate(zip(begin, chunk.offsets, extent, strict=True)):
                values = values.narrow(axis, first - origin, length)
            if extent == sizes:
                return values
            if result is None:
                result = torch.empty(sizes, dtype=stored.dtype)
            target = result
            for axis, (first, origin, length) in enumerate(zip(begin, offsets, extent, strict=True)):
                target = target.narrow(axis, first - origin, length)
            target.copy_(values)
        assert result is not None, "chunks were found to cover the tensor"
        return result

    def _map(self, name: str, stored: StoredTensor, chunk: _Chunk) -> Tensor:
        """A chunk's values [chunk.sizes], as a view of its file."""
        if chunk.file not in self._maps:
            with (self.directory / chunk.file).open("rb") as file:
                # A private map: tensors want writable memory, and the file cannot be changed through this one.
                self._maps[chunk.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            values, dtype = find_values(self._maps[chunk.file], chunk.start, chunk.length, chunk.sizes)
            if dtype != stored.dtype:
                raise DamagedTensor(f"its values are {dtype}, its metadata says {stored.dtype}")
        except DamagedTensor as error:
            path = self.directory / chunk.file
            raise UserError(f"{path}: {name} at byte {chunk.start} is damaged: {error}") from error
        return torch.frombuffer(self._maps[chunk.file], dtype=dtype, count=prod(chunk.sizes), offset=values).view(
            chunk.sizes
        )

    def _find_tensors(self, metadata: CheckpointMetadata) -> None:
        """Note all tensors, and sort the places of all chunks to them."""
        self.tensors |= {name: StoredTensor(tensor.shape, tensor.dtype) for name, tensor in metadata.tensors.items()}
        for place in metadata.places:
            if place.name in metadata.objects:
                continue
            described = metadata.tensors[place.name]
            offsets = place.offsets if place.offsets is not None else (0,) * len(described.shape)
            chunk = _Chunk(offsets, described.chunks[offsets], place.file, place.start, place.length)
            self.tensors[place.name].chunks.append(chunk)
        for stored in self.tensors.values():
            stored.chunks.sort(key=lambda chunk: chunk.offsets)

    def _file_problems(self) -> list[str]:
        needed: dict[str, int] = {}
        for stored in self.tensors.values():
            for chunk in stored.chunks:
                needed[chunk.file] = max(needed.get(chunk.file, 0), chunk.start + chunk.length)
        problems = []
        for name, size in sorted(needed.items()):
            path = self.directory / name
            if not path.is_file():
                problems.append(f"{name}: missing")
            elif path.stat().st_size < size:
                problems.append(f"{name}: truncated: {path.stat().st_size} bytes, but its tensors end at {size}")
        return problems

    def _coverage_problems(self) -> list[str]:
        return [
            f"{name}: its chunks hold {held:,} of {prod(stored.shape):,} values"
            for name, stored in self.tensors.items()
            if (held := sum(prod(chunk.sizes) for chunk in stored.chunks)) != prod(stored.shape)
        ]


def _intersection(chunk: _Chunk, offsets: Shape, sizes: Shape) -> tuple[Shape, Shape] | None:
    """Begin and extent of the block that a chunk and a block have in common; None if there is none."""
    begin = tuple(max(a, b) for a, b in zip(chunk.offsets, offsets, strict=True))
    ends = [min(a + m, b + n) for a, m, b, n in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)]
    extent = tuple(end - first for end, first in zip(ends, begin, strict=True))
    return (begin, extent) if all(length > 0 for length in extent) else None


def _read_metadata(directory: Path) -> CheckpointMetadata:
    """The `.metadata` file of a torch_dist checkpoint.

    Raises:
        UserError: there is none, or it cannot be understood.
    """
    path = directory / ".metadata"
    if not path.is_file():
        raise UserError(f"{directory}: not a distributed checkpoint (no .metadata){_others(directory)}")
    form = directory / "metadata.json"
    if form.is_file():
        try:
            described = json.loads(form.read_text(encoding="utf-8"))
            backend, version = described["sharded_backend"], described.get("sharded_backend_version", _FORMAT_VERSION)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{form}: not megatron-core's description of a checkpoint: {error!r}") from error
        if backend != "torch_dist":
            raise UserError(f"{directory}: a checkpoint of format {backend!r}; only torch_dist can be read")
        if version != _FORMAT_VERSION:
            raise UserError(
                f"{form}: torch_dist of version {version!r}; this version of megatron_entropic reads "
                f"{_FORMAT_VERSION}. Save the checkpoint with an older megatron-core, or update megatron_entropic"
            )
    return read_checkpoint_metadata(path)


def _others(directory: Path) -> str:
    """A hint for who named a folder above or below the checkpoint."""
    if not directory.is_dir():
        return "; there is no such directory"
    found = sorted(path.parent for pattern in ("*/.metadata", "*/*/.metadata") for path in directory.glob(pattern))
    return f"; below it are {', '.join(str(path) for path in found[:8])}" if found else ""


# What megatron-core's distributed checkpoints call the parameters of a GPTModel.
#
# A checkpoint holds unsharded tensors; layers and experts are either leading axes of one tensor or numbers in its name:
#
#   | decoder.layers.REST               [layers, ...]           all layers alike (the default of dense models)
#   | decoder.layers.N.REST             [...]                   layers of several kinds
#   | mlp.experts.experts.linear_fc1    [..., experts, ...]     in either
#   | mlp.experts.experts.N.linear_fc1  [...]                   with the option singleton_local_shards, which also
#   | splits
#   | mlp.linear_fc1.weight_w, _v                               gate and up projection
#
# Norms before a linear layer have the names that Transformer Engine's fused layers give them; megatron-core's other
# layer specs translate theirs when saving. Where experts follow, only those specs use the fused name: with Transformer
# Engine the norm stands alone. Under latent attention they translate nothing, and the norm before attention stands
# alone with both; this project's layers translate the rest.

_LAYER = re.compile(r"^decoder\.layers\.\d+\.")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.\d+\.")
_FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_FUSED_LATENT = {
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}
"""Names of norms -> those in Transformer Engine's fused layers, under latent attention."""


@dataclass(frozen=True)
class Place:
    """Place of a parameter: tensor `key`, below leading axes of lengths `axes` at the indices `index`."""

    key: str
    axes: Shape = ()
    index: tuple[int, ...] = ()
    first_row: int = 0
    """Row of the parameter that is row 0 here; not 0 only for the second half of a split pair."""

    def shape(self, entry: Entry) -> Shape:
        """Shape of the stored tensor, without padding of the vocabulary."""
        return (*self.axes, *entry.shape)


def places_to_write(entry: Entry, dimensions: ModelDimensions) -> tuple[Place, ...]:
    """Places of a parameter in a new checkpoint, as megatron-core itself saves a model of these dimensions.

    More than one place for norms that layer specs name differently, so that each finds it under its own name.
    """
    stacked = dimensions.experts is None
    wanted = _by_spec(entry, dimensions)
    return tuple(place for place in possible_places(entry, dimensions, stacked=stacked) if place.key.endswith(wanted))


def _by_spec(entry: Entry, dimensions: ModelDimensions) -> tuple[str, ...]:
    """Last parts of the names under which megatron-core's specs look for the parameter."""
    rest = _LAYER.sub("", entry.megatron_name)
    if entry.expert is not None:
        return ("mlp.experts.experts." + _EXPERT.sub("", rest),)
    fused = _fused(dimensions)
    if entry.layer is None or rest not in fused:
        return (rest,)
    before_experts = rest == "pre_mlp_layernorm.weight" and dimensions.has_experts(entry.layer)
    if dimensions.latent is not None:
        return (rest,) if before_experts else (fused[rest], rest)
    return (fused[rest], rest) if before_experts else (fused[rest],)


def _fused(dimensions: ModelDimensions) -> dict[str, str]:
    """Names of norms -> those in Transformer Engine's fused layers."""
    return _FUSED if dimensions.latent is None else _FUSED_LATENT


def possible_places(entry: Entry, dimensions: ModelDimensions, *, stacked: bool | None = None) -> Iterator[Place]:
    """Yields the place in every single tensor that can hold the whole parameter.

    Layers are a leading axis (`stacked`), numbers in the name (not `stacked`), or either (None).
    """
    if entry.layer is None:
        yield Place(entry.megatron_name)
        return
    rest, fused = _LAYER.sub("", entry.megatron_name), _fused(dimensions)
    forms: list[tuple[str, Shape, tuple[int, ...]]] = []
    if stacked is not False:
        forms.append(("decoder.layers.", (dimensions.num_layers,), (entry.layer,)))
    if stacked is not True:
        forms.append((f"decoder.layers.{entry.layer}.", (), ()))
    for prefix, axes, index in forms:
        if entry.expert is None:
            for name in (fused.get(rest, rest), *([rest] if rest in fused else [])):
                yield Place(prefix + name, axes, index)
        else:
            name = _EXPERT.sub("", rest)
            experts = dimensions.size("experts")
            yield Place(f"{prefix}mlp.experts.experts.{name}", (*axes, experts), (*index, entry.expert))
            yield Place(f"{prefix}mlp.experts.experts.{entry.expert}.{name}", axes, index)


def split_pairs(entry: Entry, dimensions: ModelDimensions) -> Iterator[tuple[Place, Place]]:
    """Every pair of tensors that can hold gate and up projection apart; nothing for other parameters."""
    if not entry.megatron_name.endswith("linear_fc1.weight"):
        return
    for place in possible_places(entry, dimensions):
        gate, up = (Place(f"{place.key}_{half}", place.axes, place.index) for half in "wv")
        yield gate, Place(up.key, up.axes, up.index, first_row=entry.hf_shapes[0][0])
