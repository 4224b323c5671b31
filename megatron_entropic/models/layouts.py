"""The handful of ways in which Hugging Face tensors become one Megatron parameter, sharded over TP ranks.

Every layout is two facts. `partition_dim`: the axis along which each Hugging Face tensor is cut into TP slices
(None: every rank holds all of it). `combine` / `separate`: how the slices of one rank form that rank's parameter,
and back. Loading slices and combines, gathering separates and concatenates, so both directions are one definition
and are exact (values are moved, never computed). The unsharded Megatron tensor is the case tensor_parallel = 1.

Shapes: D = head_dim, G = num_query_groups, R = num_attention_heads / G, H = hidden_size, P = tensor_parallel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_entropic.models.dimensions import ModelDimensions

Shape = tuple[int, ...]


class Layout(Protocol):
    """One row's layout in an architecture table; axes are names that `ModelDimensions.size` knows."""

    partition_dim: ClassVar[int | None]
    """Axis of the Hugging Face tensors that TP cuts; None for replicated parameters."""

    def hf_shapes(self, dimensions: ModelDimensions) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order of the row's names."""

    def combine(self, dimensions: ModelDimensions, parts: Sequence[Tensor]) -> Tensor:
        """One TP rank's slices of the Hugging Face tensors -> that rank's Megatron parameter."""

    def separate(self, dimensions: ModelDimensions, shard: Tensor) -> tuple[Tensor, ...]:
        """Inverse of `combine`, as views of `shard` where its memory allows."""


@dataclass(frozen=True)
class _OneTensor:
    """A parameter that is one Hugging Face tensor, cut or not."""

    axes: tuple[str, ...]
    partition_dim: ClassVar[int | None] = None

    def hf_shapes(self, dimensions: ModelDimensions) -> tuple[Shape, ...]:
        """Shape of the one tensor, from the names of its axes."""
        return (tuple(dimensions.size(axis) for axis in self.axes),)

    def combine(self, dimensions: ModelDimensions, parts: Sequence[Tensor]) -> Tensor:
        """The tensor itself."""
        (part,) = parts
        return part

    def separate(self, dimensions: ModelDimensions, shard: Tensor) -> tuple[Tensor, ...]:
        """The tensor itself."""
        return (shard,)


class Replicated(_OneTensor):
    """The same tensor on every TP rank (norms)."""


class RowShard(_OneTensor):
    """Matrix [out, in] cut along the input axis (attention output, second feed-forward matrix)."""

    partition_dim: ClassVar[int | None] = 1


class OutputShard(_OneTensor):
    """Matrix [out, in] cut along the output axis (matrix B of an adapter)."""

    partition_dim: ClassVar[int | None] = 0


class VocabularyShard(_OneTensor):
    """Matrix [vocab, H] cut by vocabulary, padded with zero rows until P divides it (embedding, output layer)."""

    partition_dim: ClassVar[int | None] = 0


@dataclass(frozen=True)
class ColumnShard:
    """Several [out, in] matrices stacked along their output axes, each cut along it.

    One matrix is the plain column shard. Two are gate and up of a gated feed-forward layer: the full parameter is
    [gate; up], a rank's parameter is [its rows of gate; its rows of up].
    """

    outputs: tuple[str, ...]
    input: str
    partition_dim: ClassVar[int | None] = 0

    def hf_shapes(self, dimensions: ModelDimensions) -> tuple[Shape, ...]:
        """Shape [out, in] of each stacked matrix."""
        return tuple((dimensions.size(output), dimensions.size(self.input)) for output in self.outputs)

    def combine(self, dimensions: ModelDimensions, parts: Sequence[Tensor]) -> Tensor:
        """Stack the slices."""
        return torch.cat(tuple(parts), dim=0)

    def separate(self, dimensions: ModelDimensions, shard: Tensor) -> tuple[Tensor, ...]:
        """Cut the stack; a rank holds the same fraction of every matrix."""
        sizes = [dimensions.size(output) for output in self.outputs]
        assert sum(sizes) % shard.shape[0] == 0, (sizes, tuple(shard.shape))
        ranks = sum(sizes) // shard.shape[0]
        return torch.split(shard, [size // ranks for size in sizes], dim=0)


@dataclass(frozen=True)
class QkvInterleaved:
    """q, k and v of one attention layer, interleaved by query group and cut along the groups.

    Rows of the parameter, for each group g: R*D rows of q (the heads that share g's key), D rows of k, D rows of v.
    A TP rank holds G/P consecutive groups. With `input` None the tensors are biases, [rows] instead of [rows, in].
    """

    input: str | None
    partition_dim: ClassVar[int | None] = 0

    def hf_shapes(self, dimensions: ModelDimensions) -> tuple[Shape, ...]:
        """Shapes of q, k and v."""
        columns = () if self.input is None else (dimensions.size(self.input),)
        rows = (dimensions.size("query"), dimensions.size("key_value"), dimensions.size("key_value"))
        return tuple((row, *columns) for row in rows)

    def combine(self, dimensions: ModelDimensions, parts: Sequence[Tensor]) -> Tensor:
        """Join q, k, v: [G' R D, ...], [G' D, ...], [G' D, ...] -> [G' (R + 2) D, ...] with G' groups on this rank."""
        groups = parts[1].shape[0] // dimensions.head_dim
        grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def separate(self, dimensions: ModelDimensions, shard: Tensor) -> tuple[Tensor, ...]:
        """Split [G' (R + 2) D, ...] into q, k, v of these groups (copies: the rows are not contiguous)."""
        ratio = dimensions.num_attention_heads // dimensions.num_query_groups
        head = dimensions.head_dim
        grouped = shard.reshape(-1, (ratio + 2) * head, *shard.shape[1:])
        return tuple(part.flatten(0, 1) for part in torch.split(grouped, [ratio * head, head, head], dim=1))


def slice_for_rank(tensor: Tensor, partition_dim: int | None, tp_rank: int, tp_size: int) -> Tensor:
    """Slice `tp_rank` of `tp_size` equal slices, a view unless zero rows had to be added at the end."""
    if partition_dim is None:
        return tensor
    length = tensor.shape[partition_dim]
    width = -(-length // tp_size)
    start = min(tp_rank * width, length)
    kept = min(width, length - start)
    piece = tensor.narrow(partition_dim, start, kept)
    if kept == width:
        return piece
    shape = list(piece.shape)
    shape[partition_dim] = width - kept
    return torch.cat([piece, piece.new_zeros(shape)], dim=partition_dim)


def write_slice(whole: Tensor, piece: Tensor, partition_dim: int | None, tp_rank: int, tp_size: int) -> None:
    """Put slice `tp_rank` of `tp_size` into a tensor without padding; the inverse of `slice_for_rank` over all ranks.

    What every rank holds in full is written by rank 0.
    """
    if partition_dim is None:
        if tp_rank == 0:
            whole.copy_(piece)
        return
    length = whole.shape[partition_dim]
    width = -(-length // tp_size)
    start = min(tp_rank * width, length)
    kept = min(width, length - start)
    whole.narrow(partition_dim, start, kept).copy_(piece.narrow(partition_dim, 0, kept))
