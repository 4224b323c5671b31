"""Checksums of weight tensors that can be taken piecewise: of those a policy sent, and of those in an engine.

    checksum = sum over elements of bits(element) * weight(position in the whole tensor)   mod 2^64

Sums of disjoint pieces add up, so each engine worker sums its own shard, wherever in the tensor it lies. Weights are
odd and differ by position: a changed bit, a swap and a shift all change the sum. -0.0 counts as 0.0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_entropic.weight_sync.delta import bits_of

_CHUNK_ELEMENTS = 2**20
# Odd constants of splitmix64, as signed 64-bit integers.
_FACTORS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


@dataclass(frozen=True)
class Piece:
    """A rectangle of a Hugging Face tensor as it lies in one engine worker."""

    name: str
    row: int
    """First row (element of a vector) in the whole tensor."""
    column: int
    """First column in the whole tensor; 0 for a vector."""
    checksum: int


def checksum(values: torch.Tensor, *, row: int = 0, column: int = 0, columns: int | None = None) -> int:
    """Checksum of `values`, [rows, columns] or [rows]: a sum over their elements, in [-2^63, 2^63).

    Args:
        values: bfloat16 or float32; a piece of a tensor or all of it.
        row, column: place in the whole tensor at which the piece begins.
        columns: columns of the whole tensor; None if the piece is as wide.
    """
    values = values.detach()
    table = values.unsqueeze(1) if values.dim() == 1 else values
    width = table.shape[1] if columns is None else columns
    across = torch.arange(column, column + table.shape[1], device=table.device)
    total = torch.zeros((), dtype=torch.int64, device=table.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, table.shape[1]))
    for first in range(0, table.shape[0], step):
        part = table[first : first + step]
        down = torch.arange(row + first, row + first + part.shape[0], device=table.device)
        positions = down.unsqueeze(1) * width + across
        total += (bits_of((part + 0.0).contiguous()).to(torch.int64) * _weights(positions)).sum()
    return int(total)


def checksums(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Checksum of every whole tensor by name."""
    return {name: checksum(tensor) for name, tensor in tensors}


def mismatches(sent: Mapping[str, int], engines: Mapping[str, Iterable[Piece]]) -> list[str]:
    """Lines about tensors that differ between those sent and the pieces in each engine, one line a tensor.

    A piece that several workers of an engine hold must be the same in each.
    """
    return [line for engine, pieces in engines.items() for line in _differences(sent, engine, pieces)]


def _differences(sent: Mapping[str, int], engine: str, pieces: Iterable[Piece]) -> Iterator[str]:
    found: dict[str, dict[tuple[int, int], set[int]]] = defaultdict(lambda: defaultdict(set))
    for piece in pieces:
        found[piece.name][piece.row, piece.column].add(piece.checksum)
    for name in sorted(sent.keys() | found.keys()):
        if name not in found:
            yield f"{name}: not found in {engine}"
        elif name not in sent:
            yield f"{name}: in {engine}, but was not sent"
        elif any(len(copies) > 1 for copies in found[name].values()):
            yield f"{name}: the workers of {engine} hold different copies"
        elif (sum(min(copies) for copies in found[name].values()) - sent[name]) % 2**64:
            yield f"{name}: {engine} holds other values than were sent"


def _weights(positions: torch.Tensor) -> torch.Tensor:
    """Weight of each position, an odd pseudo-random int64 (the finaliser of splitmix64 with arithmetic shifts)."""
    mixed = (positions + 1) * _FACTORS[0]
    mixed = (mixed ^ (mixed >> 30)) * _FACTORS[1]
    mixed = (mixed ^ (mixed >> 27)) * _FACTORS[2]
    return (mixed ^ (mixed >> 31)) | 1
