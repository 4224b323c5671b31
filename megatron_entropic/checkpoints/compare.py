"""Bit-for-bit comparison of a Hugging Face directory with a distributed checkpoint, tensor by tensor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_entropic.checkpoints.convert import PIECE_BYTES, UNTOLD, Progress
from megatron_entropic.checkpoints.hf import HfReader
from megatron_entropic.checkpoints.open_weights import MegatronCheckpoint
from megatron_entropic.checkpoints.pieces import pieces_of
from megatron_entropic.models.parameter_map import Entry


@dataclass
class Difference:
    """Difference of one tensor between a Hugging Face directory and a distributed checkpoint."""

    name: str
    """Name of the Hugging Face tensor."""
    hf_dtype: torch.dtype
    megatron_dtype: torch.dtype
    values: int
    differing: int = 0
    """Number of values whose bits differ; with different dtypes, after conversion of the Hugging Face tensor."""
    largest: float = 0.0
    """Largest absolute difference among values that are numbers on both sides."""
    hf_nan: int = 0
    megatron_nan: int = 0

    @property
    def is_equal(self) -> bool:
        """Whether the bits are the same, after conversion where dtypes differ, and no value is NaN on either side."""
        return not (self.differing or self.hf_nan or self.megatron_nan)


def compare_weights(
    hf_dir: Path,
    megatron_dir: Path,
    *,
    workers: int = 2,
    progress: Progress = UNTOLD,
) -> list[Difference]:
    """Compare all tensors of the model; the result is in the order of the forward pass.

    Args:
        hf_dir, megatron_dir: directories, which are only read.
        progress: is told how much is compared.

    Raises:
        ValueError: from `HfReader` or `MegatronCheckpoint`: one of them is not the whole model.
    """
    reader = HfReader(hf_dir)
    checkpoint = MegatronCheckpoint(megatron_dir, reader.parameter_map)
    entries = [entry for entry in reader.parameter_map.entries if entry.exported]
    progress.begin(sum(prod(entry.shape) * checkpoint.dtype(entry).itemsize for entry in entries))

    def compare(entry: Entry) -> list[Difference]:
        return _compare_entry(reader, checkpoint, entry, progress)

    with ThreadPoolExecutor(workers, thread_name_prefix="compare") as pool:
        return [difference for some in pool.map(compare, entries) for difference in some]


def _compare_entry(
    reader: HfReader, checkpoint: MegatronCheckpoint, entry: Entry, progress: Progress
) -> list[Difference]:
    dimensions, dtype = reader.parameter_map.dimensions, checkpoint.dtype(entry)
    differences = {
        name: Difference(name, reader.stored_dtype(name), dtype, prod(shape))
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    for piece in pieces_of(entry, dimensions, PIECE_BYTES // dtype.itemsize):
        values = checkpoint.rows(entry, piece.start, piece.stop)
        for rows, found in zip(piece.sources, piece.separate(dimensions, values), strict=True):
            _compare_values(differences[rows.name], reader[rows.name][rows.start : rows.stop], found)
        progress.advance(values.nbytes)
    return list(differences.values())


def _compare_values(difference: Difference, hf: Tensor, megatron: Tensor) -> None:
    """Add the differences in some rows of a tensor."""
    wanted = hf.to(megatron.dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[megatron.dtype.itemsize]
    difference.hf_nan += int(hf.isnan().sum())
    difference.megatron_nan += int(megatron.isnan().sum())
    unequal = wanted.contiguous().view(bits) != megatron.contiguous().view(bits)
    count = int(unequal.sum())
    if count:
        difference.differing += count
        distance = (wanted[unequal].double() - megatron[unequal].double()).abs().nan_to_num(nan=0.0)
        difference.largest = max(difference.largest, float(distance.max()))
