"""Hugging Face directory -> distributed checkpoint of megatron-core (torch_dist) -> Hugging Face directory.

Both directions move values in pieces of at most PIECE_BYTES from one memory map to a file; no model is built, and the
map decides what goes where. The output appears when it is complete (`atomic_directory`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial as bind
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_entropic.checkpoints.hf import HfReader, copy_companions, create_weight_files
from megatron_entropic.checkpoints.open_weights import MegatronCheckpoint
from megatron_entropic.checkpoints.pieces import Piece, equal_parts, pieces_of
from megatron_entropic.checkpoints.safetensors_files import DTYPE_NAMES, SafetensorsWriter
from megatron_entropic.checkpoints.torch_dist import places_to_write
from megatron_entropic.checkpoints.torch_dist_writer import Chunk, write_torch_dist
from megatron_entropic.checkpoints.unusable_tensors import UnusableTensors
from megatron_entropic.errors import Problems, UserError
from megatron_entropic.files.atomic import appears_when_complete, output_problems
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap

PIECE_BYTES = 16 * 2**20
"""Size of a piece in memory; a thread holds about three of them at most.

From 32 MiB on, the C library gives memory back as soon as it is free, and every new piece would cost page faults that
take four times as long as copying it.
"""
_ADVICE = ", or be given one with --dtype"


class Progress(Protocol):
    """Whoever is told how far a copy has come."""

    def begin(self, total_bytes: int) -> None:
        """Take the number of bytes of the whole, once, when everything has been checked."""

    def advance(self, nbytes: int) -> None:
        """Take the number of bytes done since the last call; comes from any thread."""


class _Untold:
    def begin(self, total_bytes: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...


UNTOLD: Progress = _Untold()
"""Progress that nobody is told of."""


def hf_to_megatron(
    hf_dir: Path,
    output_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    workers: int = 2,
    progress: Progress = UNTOLD,
) -> None:
    """Write a distributed checkpoint with the weights of a Hugging Face directory, and its configuration beside them.

    Args:
        hf_dir: Hugging Face directory, which is only read.
        output_dir: directory that must not exist, or be empty.
        dtype: dtype of the output's parameters; None keeps the dtype of the input. Buffers keep theirs.
        progress: is told how much is written.

    Raises:
        UserError: from `HfReader`, or one error that lists why nothing can be written; or tensors hold NaN or
            infinite values.
        OSError: the output could not be written.
    """
    reader = HfReader(hf_dir)
    output_dir = Path(output_dir).absolute()
    stored = {name: reader.stored_dtype(name) for name in reader.names if name not in reader.parameter_map.buffers}
    target = dtype or _only_dtype(stored, reader.hf_dir, _ADVICE)
    invalid = UnusableTensors()
    chunks = list(_chunks(reader, target, invalid, progress))
    total = sum(chunk.nbytes for chunk in chunks)
    _refuse(output_dir, total, workers=workers)
    progress.begin(total)
    with appears_when_complete(output_dir) as directory:
        write_torch_dist(directory, chunks, workers=workers)
        invalid.raise_if_any(hf_dir, "not converted")
        copy_companions(directory, reader.hf_dir, target)


def megatron_to_hf(
    megatron_dir: Path,
    output_dir: Path,
    *,
    template_dir: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    workers: int = 2,
    progress: Progress = UNTOLD,
) -> None:
    """Write a Hugging Face directory with the weights of a distributed checkpoint.

    Args:
        megatron_dir: a converted checkpoint, one of a run, or one of another Megatron training script; is only read.
        output_dir: directory that must not exist, or be empty.
        template_dir: Hugging Face directory with the model's configuration and tokenizer; None: they are in
            `megatron_dir`, as a conversion leaves them.
        max_shard_bytes: size of a weight file, as in `write_hf_directory`.
        workers, progress: as in `hf_to_megatron`.

    Raises:
        UserError: from `read_dimensions` or `MegatronCheckpoint`, or one error that lists why nothing can be written;
            or tensors hold NaN or infinite values.
        OSError: the output could not be written.
    """
    megatron_dir, output_dir = Path(megatron_dir), Path(output_dir).absolute()
    template_dir, parameter_map = read_template(megatron_dir, template_dir)
    checkpoint = MegatronCheckpoint(megatron_dir, parameter_map)
    exported = [entry for entry in parameter_map.entries if entry.exported]
    parameters = [entry for entry in exported if not entry.buffer]
    dtype = _only_dtype({entry.megatron_name: checkpoint.dtype(entry) for entry in parameters}, megatron_dir)
    dtypes = {name: checkpoint.dtype(entry) for entry in exported for name in entry.hf_names}
    total = sum(prod(entry.shape) * checkpoint.dtype(entry).itemsize for entry in exported)
    _refuse(output_dir, total, workers=workers, max_shard_bytes=max_shard_bytes)
    progress.begin(total)
    invalid = UnusableTensors()
    with appears_when_complete(output_dir) as directory:
        writers = create_weight_files(directory, parameter_map.hf_tensors, dtypes, max_shard_bytes)
        limit = PIECE_BYTES // dtype.itemsize
        pieces = [piece for entry in exported for piece in pieces_of(entry, parameter_map.dimensions, limit)]
        _for_each(pieces, bind(_write_piece, checkpoint, writers, invalid, progress), workers)
        invalid.raise_if_any(megatron_dir, "not converted")
        copy_companions(directory, template_dir, dtype)


def read_template(megatron_dir: Path, template_dir: Path | None) -> tuple[Path, ParameterMap]:
    """The directory that describes the model of a checkpoint, and the model's parameters.

    Raises:
        UserError: from `read_dimensions`; or there is no such description, and the message asks for one.
    """
    directory = Path(template_dir or megatron_dir)
    if template_dir is None and not (directory / "config.json").is_file():
        raise UserError(
            f"{directory}: no config.json beside the checkpoint; name a Hugging Face directory of the same model "
            "as template"
        )
    return directory, ParameterMap(read_dimensions(directory))


def _chunks(reader: HfReader, dtype: torch.dtype, invalid: UnusableTensors, progress: Progress) -> Iterator[Chunk]:
    """All chunks of the checkpoint, in the order of the forward pass."""
    dimensions = reader.parameter_map.dimensions
    for entry in reader.parameter_map.entries:
        if not entry.exported:
            continue
        own_dtype = reader.stored_dtype(entry.hf_names[0]) if entry.buffer else dtype
        for piece in pieces_of(entry, dimensions, PIECE_BYTES // own_dtype.itemsize):
            for place in places_to_write(entry, dimensions):
                read = bind(_read_piece, reader, piece, own_dtype, invalid, progress)
                yield Chunk(
                    place.key,
                    shape=place.shape(entry),
                    offsets=(*place.index, piece.start, *(0 for _ in entry.shape[1:])),
                    sizes=(*(1 for _ in place.index), piece.stop - piece.start, *entry.shape[1:]),
                    dtype=own_dtype,
                    read=read,
                )


def _read_piece(
    reader: HfReader, piece: Piece, dtype: torch.dtype, invalid: UnusableTensors, progress: Progress
) -> Tensor:
    """Rows of a parameter from the Hugging Face directory, in `dtype`; a view of the map where that is possible."""
    parts = [reader[rows.name][rows.start : rows.stop].to(dtype) for rows in piece.sources]
    for rows, part in zip(piece.sources, parts, strict=True):
        invalid.check(rows.name, part)
    values = piece.combine(reader.parameter_map.dimensions, parts)
    progress.advance(values.nbytes)
    return values


def _write_piece(
    checkpoint: MegatronCheckpoint,
    writers: dict[str, SafetensorsWriter],
    invalid: UnusableTensors,
    progress: Progress,
    piece: Piece,
) -> None:
    """Write rows of a parameter from the checkpoint to the files of their Hugging Face tensors."""
    values = checkpoint.rows(piece.entry, piece.start, piece.stop)
    for rows, part in zip(piece.sources, piece.separate(checkpoint.parameter_map.dimensions, values), strict=True):
        invalid.check(rows.name, part)
        writers[rows.name].write(rows.name, part, first_row=rows.start)
    progress.advance(values.nbytes)


def _for_each(pieces: Sequence[Piece], action: Callable[[Piece], None], workers: int) -> None:
    """Call `action` in several threads; the first failure ends all.

    Each thread has a run of the pieces. Threads that took turns would mostly write to the same file, which only one can
    do at a time.
    """
    stopping = threading.Event()

    def run(part: list[Piece]) -> None:
        try:
            for piece in part:
                if stopping.is_set():
                    return
                action(piece)
        except BaseException:
            stopping.set()
            raise

    parts = equal_parts(pieces, workers, lambda piece: piece.elements)
    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        try:
            for future in [pool.submit(run, part) for part in parts]:
                future.result()
        finally:
            stopping.set()


def _only_dtype(dtypes: Mapping[str, torch.dtype], source: Path, advice: str = "") -> torch.dtype:
    """The dtype that all tensors share, by name.

    Raises:
        UserError: they have several, or one in which no weights are written; lists the tensors that stand out.
    """
    usual, count = Counter(dtypes.values()).most_common(1)[0]
    if count == len(dtypes) and usual in DTYPE_NAMES:
        return usual
    problems = Problems()
    for name, dtype in dtypes.items():
        if dtype != usual or dtype not in DTYPE_NAMES:
            problems.add("tensors of other dtypes", f"{name}: {dtype}")
    supported = ", ".join(map(str, DTYPE_NAMES))
    problems.raise_if_any(f"{source}: tensors must share one dtype of {supported}{advice}; most are {usual}:")
    raise AssertionError("some tensor stood out")


def _refuse(output_dir: Path, total_bytes: int, **numbers: int) -> None:
    problems = Problems()
    for name, number in numbers.items():
        if number < 1:
            problems.add(f"{name} must be at least 1, not {number}")
    for problem in output_problems(output_dir, total_bytes):
        problems.add(problem)
    problems.raise_if_any("nothing was written:")
