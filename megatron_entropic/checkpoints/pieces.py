"""Parameters cut into runs of rows that are small enough to be in memory, each with its source and its place.

A run of rows of a Megatron parameter corresponds to one run of rows of each of some Hugging Face tensors: of one tensor
where tensors are stacked, of q, k and v for a run of query groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from torch import Tensor

from megatron_entropic.models.dimensions import ModelDimensions
from megatron_entropic.models.layouts import QkvInterleaved
from megatron_entropic.models.parameter_map import Entry

Item = TypeVar("Item")


@dataclass(frozen=True)
class HfRows:
    """Rows `start` to `stop` of a Hugging Face tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of the unsharded Megatron parameter `entry`, and the rows of which they are made."""

    entry: Entry
    start: int
    stop: int
    sources: tuple[HfRows, ...]

    @property
    def elements(self) -> int:
        """Number of values of the rows."""
        return (self.stop - self.start) * prod(self.entry.shape[1:])

    def combine(self, dimensions: ModelDimensions, parts: Sequence[Tensor]) -> Tensor:
        """The rows of the parameter from those of its sources, in their order; a view where there is one source."""
        return parts[0] if len(parts) == 1 else self.entry.layout.combine(dimensions, parts)

    def separate(self, dimensions: ModelDimensions, rows: Tensor) -> tuple[Tensor, ...]:
        """Inverse of `combine`."""
        return (rows,) if len(self.sources) == 1 else self.entry.layout.separate(dimensions, rows)


def pieces_of(entry: Entry, dimensions: ModelDimensions, max_elements: int) -> Iterator[Piece]:
    """The whole parameter in pieces of at most `max_elements` values (but at least one row, or one query group)."""
    columns = prod(entry.shape[1:])
    if isinstance(entry.layout, QkvInterleaved):
        yield from _pieces_of_qkv(entry, dimensions.num_query_groups, max_elements // columns)
        return
    first_row = 0
    for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True):
        for start, stop in _runs(shape[0], max_elements // columns):
            yield Piece(entry, first_row + start, first_row + stop, (HfRows(name, start, stop),))
        first_row += shape[0]


def equal_parts(items: Sequence[Item], count: int, size: Callable[[Item], int]) -> list[list[Item]]:
    """The items in order, in at most `count` parts of about equal size, none of them empty."""
    parts: list[list[Item]] = [[] for _ in range(count)]
    total, done = sum(map(size, items)), 0
    for item in items:
        parts[min(done * count // max(total, 1), count - 1)].append(item)
        done += size(item)
    return [part for part in parts if part]


def _pieces_of_qkv(entry: Entry, groups: int, max_rows: int) -> Iterator[Piece]:
    """Pieces of a q, k, v parameter, each a run of query groups; every group has as many rows of q, of k and of v."""
    group_rows = entry.shape[0] // groups
    for start, stop in _runs(groups, max_rows // group_rows):
        sources = tuple(
            HfRows(name, start * shape[0] // groups, stop * shape[0] // groups)
            for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
        )
        yield Piece(entry, start * group_rows, stop * group_rows, sources)


def _runs(length: int, longest: int) -> Iterator[tuple[int, int]]:
    longest = max(1, longest)
    for start in range(0, length, longest):
        yield start, min(start + longest, length)
