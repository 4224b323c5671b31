"""A checkpoint of the distributed optimizer's own buckets, read into another layout than the one that wrote it.

megatron-core's `dp_reshardable` writes each rank's shards as they lie in memory, without a gather or a copy of the
whole state, and by itself reads them into the same tensor, pipeline and expert layout only. What is missing for any
other is where each parameter lies in the buckets. That is written beside them:

    bucket  [pad| parameter B |pad| parameter A ..]     flat; every data-parallel rank holds an equal part of it
    piece   (tensor's name, offset and extent in the model's whole tensor, start in the bucket)

A rank of another layout reads the pieces that meet the parameters of which it owns a part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SHARDS = "optimizer_shards.json"
STATE_NAMES = ("param", "exp_avg", "exp_avg_sq")
"""Names of the values that the optimizer keeps of each element of a parameter, float32."""


@dataclass(frozen=True)
class Piece:
    """A contiguous part of a bucket, and the box of a model's tensor that it is."""

    name: str
    """Name of the tensor in the checkpoint, as it is counted over the whole model."""
    offset: list[int]
    extent: list[int]
    start: int
    """Place of the first element in the bucket."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.extent).numel()


@dataclass(frozen=True)
class Bucket:
    """One flat tensor of the checkpoint for each of `STATE_NAMES`."""

    key: str
    """Name of the tensor in the checkpoint, without the name of the state."""
    numel: int
    """Number of elements without the padding that depends on the number of data-parallel ranks."""
    pieces: list[Piece]


@dataclass(frozen=True)
class Shards:
    """The whole optimizer state of a checkpoint. Equal for two runs whose shards fit each other as they are."""

    group_keys: list[str]
    """Names of the saved parameter groups with step counts, one for each of megatron-core's optimizers of a rank."""
    buckets: list[Bucket]

    def to_json(self) -> str:
        """The shards as JSON, for `read`."""
        return json.dumps(asdict(self))

    @staticmethod
    def read(directory: Path) -> Shards | None:
        """Read the shards of a checkpoint; None if it was not written as shards."""
        path = directory / SHARDS
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        buckets = [
            Bucket(entry["key"], entry["numel"], [Piece(**piece) for piece in entry["pieces"]])
            for entry in content["buckets"]
        ]
        return Shards(content["group_keys"], buckets)


def can_write_shards(parts: Sequence[Any]) -> bool:
    """Whether `dp_reshardable` can write this rank's state of megatron-core's optimizers `parts`.

    It refuses a rank whose part of a bucket is padding only, which happens to buckets of very few elements.
    """
    return all(
        ranges["param_map"]
        for part in parts
        if not part.is_stub_optimizer
        for by_dtype in part.gbuf_ranges
        for buckets in by_dtype.values()
        for ranges in buckets
    )


def own_shards(parts: Sequence[Any], model_state: dict[str, Any]) -> list[Bucket]:
    """Buckets of which this rank holds the first part; all ranks' together are those of the model.

    Args:
        parts: megatron-core's optimizers of this rank.
        model_state: sharded state of the model's chunks.
    """
    places = _places(model_state)
    buckets = []
    for number, part in enumerate(parts):
        if part.is_stub_optimizer or part.data_parallel_group.rank() != 0:
            continue
        for buffer_number, buffer in enumerate(part.buffers):
            (dtype,) = part.gbuf_ranges[buffer_number]
            for bucket_number, bucket in enumerate(buffer.buckets):
                key = (
                    f"{_group_key(number, len(parts), part.data_parallel_group_idx)}"
                    f".gbuf_idx_{buffer_number}.dtype_{dtype}.bucket_idx_{bucket_number}"
                )
                pieces = [
                    Piece(piece.name, piece.offset, piece.extent, start - bucket.offset + piece.start)
                    for parameter, (start, _, number_of_bucket) in buffer.param_index_map.items()
                    if number_of_bucket == bucket_number
                    for piece, _ in _pieces(places[parameter], torch.empty(parameter.shape, device="meta"))
                ]
                buckets.append(Bucket(key, bucket.numel_unpadded, pieces))
    return buckets


def all_shards(parts: Sequence[Any], model_state: dict[str, Any], group: dist.ProcessGroup | None = None) -> Shards:
    """Shards that all ranks of `group` (default: of the policy) hold; equal on all of them."""
    group_keys = [
        _group_key(number, len(parts), part.data_parallel_group_idx)
        for number, part in enumerate(parts)
        if not part.is_stub_optimizer
    ]
    collected: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(collected, (group_keys, own_shards(parts, model_state)), group=group)
    # Stages without experts have one optimizer less.
    longest = max((keys for keys, _ in collected), key=len)
    return Shards(longest, [bucket for _, buckets in collected for bucket in buckets])


def read_into_layout(
    directory: Path, saved: Shards, parts: Sequence[Any], model_state: dict[str, Any]
) -> dict[Any, Any]:
    """Read the saved optimizer state as `optimizer_state.state_for` takes it; called by all ranks together.

    Args:
        directory: directory of the checkpoint.
        saved: shards in it.
        parts: megatron-core's optimizers of this rank, of any layout.
        model_state: sharded state of the model's chunks.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject

    sources = _Sources(saved)
    places = _places(model_state)
    states = [_own_parameters(part, places, sources) for part in parts]
    groups = {str(n): ShardedObject(f"{key}.optimizer", None, (1,), (0,)) for n, key in enumerate(saved.group_keys)}
    request = {"groups": groups, "pieces": sources.requests}
    # Every rank asks for what it needs; that some of it is asked for twice, and some not at all, is no mistake.
    loaded = dist_checkpointing.load(request, str(directory), validate_access_integrity=False)
    sources.copy(loaded["pieces"])
    parameter_states = [{"param_state": state, "param_state_sharding_type": "fully_reshardable"} for state in states]
    saved_groups = [{"optimizer": loaded["groups"][str(n)]} for n in range(len(groups))]
    state: dict[Any, Any] = saved_groups[0] if len(groups) == 1 else dict(enumerate(saved_groups))
    if len(parts) == 1 == len(groups):
        return {**state, **parameter_states[0]}
    for number, own in enumerate(parameter_states):
        state[number] = {**state.get(number, {}), **own}
    return state


class _Sources:
    """Collector of what is to be read from a checkpoint, which then puts it where it belongs."""

    def __init__(self, saved: Shards) -> None:
        self.requests: dict[str, Any] = {}
        self._copies: list[tuple[str, Piece, Piece, torch.Tensor]] = []
        self._saved: dict[str, dict[tuple[int, ...], tuple[Bucket, Piece]]] = {}
        for bucket in saved.buckets:
            for piece in bucket.pieces:
                # Of copies that several tensor ranks hold one is enough.
                box = (*piece.offset, *piece.extent)
                self._saved.setdefault(piece.name, {}).setdefault(box, (bucket, piece))

    def ask(self, state: str, wanted: Piece, target: torch.Tensor) -> None:
        """Note that `target` shall become the box `wanted` of what the optimizer keeps under the name `state`."""
        from megatron.core.dist_checkpointing import ShardedTensor

        for bucket, piece in self._saved.get(wanted.name, {}).values():
            if _overlap(piece, wanted) is None:
                continue
            name = f"{bucket.key}.{state}/{piece.start}"
            if name not in self.requests:
                data = torch.empty(piece.numel, dtype=torch.float32)
                place = {"global_shape": (bucket.numel,), "global_offset": (piece.start,), "axis_fragmentations": None}
                self.requests[name] = ShardedTensor(
                    f"{bucket.key}.{state}", data, data.dtype, local_shape=tuple(data.shape), **place
                )
            self._copies.append((name, piece, wanted, target))

    def copy(self, loaded: dict[str, torch.Tensor]) -> None:
        """Fill all targets."""
        for name, piece, wanted, target in self._copies:
            common = _overlap(piece, wanted)
            assert common is not None
            source = loaded[name].view(piece.extent)
            target.view(wanted.extent)[_within(common, wanted)] = source[_within(common, piece)]


def _own_parameters(part: Any, places: dict[torch.Tensor, Any], sources: _Sources) -> dict[int, Any]:
    """State to be read of each parameter of which this rank owns a part, by number; empty until `sources.copy`."""
    state: dict[int, Any] = {}
    if part.is_stub_optimizer:
        return state
    number = -1
    for by_dtype, buffer in zip(part.gbuf_ranges, part.buffers, strict=True):
        owned = {parameter for buckets in by_dtype.values() for ranges in buckets for parameter in ranges["param_map"]}
        for parameter in buffer.param_index_map:
            number += 1
            if parameter not in owned:
                continue
            state[number] = {name: torch.zeros(parameter.shape, dtype=torch.float32) for name in STATE_NAMES}
            for name, tensor in state[number].items():
                for piece, target in _pieces(places[parameter], tensor):
                    sources.ask(name, piece, target)
    return state


def _places(model_state: dict[str, Any]) -> dict[torch.Tensor, Any]:
    """Place of each parameter in the whole model: megatron-core's ShardedTensor or the factory of several."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    values = nested_values(model_state)
    return {value.data: value for value in values if isinstance(value, ShardedTensor | ShardedTensorFactory)}


def _pieces(place: Any, tensor: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Yields the boxes of the model's tensors that make up a parameter, with `tensor`'s views of them.

    A factory cuts a parameter, such as gate and up projection, which the whole model has one after the other.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if not isinstance(place, ShardedTensorFactory):
        own = [replace(place, data=tensor, dtype=tensor.dtype)]
    else:
        own = list(nested_values({"": replace(place, data=tensor).build()}))
    for part in own:
        assert part.data is tensor or part.data._base is tensor, f"{part.key} is stored as a copy"
        assert part.data.is_contiguous(), part.key
        extent = [1] * part.prepend_axis_num + list(part.local_shape)
        yield Piece(part.key, list(part.global_offset), extent, part.data.storage_offset()), part.data


def _overlap(one: Piece, other: Piece) -> list[tuple[int, int]] | None:
    """Range that two boxes of a tensor have in common on each axis, as (begin, end); None if they have none."""
    common = [
        (max(a, b), min(a + a_extent, b + b_extent))
        for a, a_extent, b, b_extent in zip(one.offset, one.extent, other.offset, other.extent, strict=True)
    ]
    return common if all(start < end for start, end in common) else None


def _within(common: list[tuple[int, int]], piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(start - own, end - own) for (start, end), own in zip(common, piece.offset, strict=True))


def _group_key(number: int, count: int, group: int) -> str:
    """Name of the state of megatron-core's optimizer `number` in a group of data-parallel ranks."""
    prefix = f"chained_{number}." if count > 1 else ""
    return f"{prefix}optimizer.distributed.dp_group_idx_{group}"
