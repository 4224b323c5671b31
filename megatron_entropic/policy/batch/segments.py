"""Batches of packed segments for attention: segments of similar length run together, padded on the right.

A loop over 256 short segments spends its time starting kernels; one padded batch of all of them spends it on padding
when lengths differ. Groups in which the shortest is at least `SIMILAR` of the longest bound the padding.

Under context parallelism a rank's queries are two chunks of each segment (see `ContextCut`), and keys and values those
of all ranks, one rank's after the other. Chunk j sees the segment's chunks 0 to j, so each chunk is a batch of its own.

A segment that goes on from a prefix in another one (see `prefix_sharing`) has its own rows as queries, and sees those
of the prefix before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_entropic.policy.batch.host_copies import to_device

# How context parallelism cuts a packed micro-batch: each segment into 2 * size chunks, two for each rank.
#
#   | size 2, a segment of 8 tokens      chunk 0 | 1 | 2 | 3
#   | rank 0 holds                             0           3         local tokens t0 t1 t6 t7
#   | rank 1 holds                                 1   2             local tokens t2 t3 t4 t5
#
# Rank r holds chunks r and 2 * size - 1 - r, so that under the causal mask all ranks have the same attention work. It
# is the order that megatron-core's RoPE and Transformer Engine's attention expect of packed sequences.


@dataclass(frozen=True)
class ContextCut:
    """One rank's part of every segment; the default is all of it."""

    rank: int = 0
    size: int = 1

    @property
    def segment_multiple(self) -> int:
        """Number that the padded length of each segment is a multiple of, so that its chunks are equal."""
        return 2 * self.size if self.size > 1 else 1

    @property
    def chunks(self) -> tuple[int, ...]:
        """Numbers of the chunks of a segment that this rank holds, in its order."""
        return (self.rank, 2 * self.size - 1 - self.rank) if self.size > 1 else (0,)

    def positions(self, lengths: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        """Position of each token of this rank within its segment, [T / size] int64.

        Args:
            lengths: [segments] int64, padded lengths.
            tokens: T / size where the caller knows it, so that a GPU need not be waited for.
        """
        own = lengths // self.size
        count = int(own.sum()) if tokens is None else tokens
        starts = (own.cumsum(0) - own).repeat_interleave(own, output_size=count)
        within = torch.arange(count, device=lengths.device) - starts
        if self.size == 1:
            return within
        chunk = (own // 2).repeat_interleave(own, output_size=count)
        first, second = self.chunks
        return torch.where(within < chunk, within + first * chunk, within + (second - 1) * chunk)

    def rows(self, lengths: torch.Tensor) -> torch.Tensor:
        """Row in the whole micro-batch of each token of this rank, [T / size] int64; lengths as in `positions`."""
        starts = lengths.cumsum(0) - lengths
        return self.positions(lengths) + starts.repeat_interleave(lengths // self.size)


WHOLE = ContextCut()
"""Cut of a rank that holds all of every segment, without context parallelism."""


class Prefix(NamedTuple):
    """Consecutive rows of a micro-batch, the start of one segment, that another segment goes on from."""

    start: int
    length: int


SIMILAR = 0.75
"""Shortest over longest length within a group: at most a third more rows, and the same order of attention work."""
MASK_ELEMENTS = 2**24
"""Bound of the mask of a group that goes on from prefixes: 64 MiB where attention makes float32 numbers of it."""


@dataclass(frozen=True)
class SegmentGroup:
    """Segments, or one chunk of each, that run as one batch [count, length]."""

    rows: torch.Tensor
    """Packed row of each place of the batch, [count * length] int64; places of padding repeat a real row."""
    count: int
    length: int
    keys: torch.Tensor | None = None
    """Rows of keys and values, in those of all context-parallel ranks, [count * seen] int64; None: `rows`."""
    mask: torch.Tensor | None = None
    """Mask of the keys that a query sees, [count, 1, length, seen] bool; None: the causal mask."""

    def to(self, device: torch.device) -> SegmentGroup:
        """The same group with its tensors on `device`."""
        keys = None if self.keys is None else to_device(self.keys, device)
        mask = None if self.mask is None else to_device(self.mask, device)
        return SegmentGroup(to_device(self.rows, device), self.count, self.length, keys, mask)


@dataclass(frozen=True)
class SegmentPlan:
    """All groups, and the order in which their outputs are put back."""

    groups: tuple[SegmentGroup, ...]
    order: torch.Tensor
    """Place of each row in the concatenated outputs, [T] int64 (under context parallelism [T / size])."""

    def to(self, device: torch.device) -> SegmentPlan:
        """The same plan with its index tensors on `device`."""
        return SegmentPlan(tuple(group.to(device) for group in self.groups), to_device(self.order, device))


def plan_segments(
    lengths: list[int], cut: ContextCut = WHOLE, prefixes: dict[int, Prefix] | None = None
) -> SegmentPlan:
    """Group segments, given by length in packed order, by similar length.

    Args:
        lengths: tokens of each segment, all positive; under context parallelism multiples of `cut.segment_multiple`.
        cut: this rank's part of them.
        prefixes: by number of the segment, for those that go on from a prefix; without context parallelism only.
    """
    assert min(lengths) > 0, "an empty segment has no place in a plan"
    prefixes = prefixes or {}
    assert not prefixes or cut.size == 1, "a prefix is not cut"
    # Of a whole segment there is one chunk.
    chunk = torch.tensor(lengths) // cut.segment_multiple
    own = torch.tensor(lengths) // cut.size
    start = own.cumsum(0) - own
    batches: list[tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]] = []
    whole = torch.tensor([index for index in range(len(lengths)) if index not in prefixes], dtype=torch.int64)
    for place, index in enumerate(cut.chunks):
        for members in _similar_runs(_longest_first(whole, chunk), chunk):
            rows, real = _padded_rows((start + place * chunk)[members], chunk[members])
            seen = _seen_keys(chunk[members], start[members], index, cut, int(own.sum())) if cut.size > 1 else ()
            batches.append((rows, real, seen))
    for members in _runs_after_prefixes(prefixes, chunk):
        rows, real = _padded_rows(start[members], chunk[members])
        before = torch.tensor([prefixes[index] for index in members.tolist()])
        batches.append((rows, real, _seen_after_prefixes(before, rows)))
    order = torch.empty(int(own.sum()), dtype=torch.int64)
    offset = 0
    for rows, real, _ in batches:
        order[rows[real]] = offset + torch.arange(rows.numel()).view_as(rows)[real]
        offset += rows.numel()
    groups = [SegmentGroup(rows.flatten(), rows.shape[0], rows.shape[1], *seen) for rows, _, seen in batches]
    return SegmentPlan(tuple(groups), order)


def _padded_rows(start: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of n runs of `length` rows each, and which of them are no padding, both [n, longest]."""
    column = torch.arange(int(length.max()))
    # Padding repeats the last row: finite values, which no real query sees.
    return start[:, None] + torch.minimum(column, length[:, None] - 1), column < length[:, None]


def _runs_after_prefixes(prefixes: dict[int, Prefix], chunk: torch.Tensor) -> Iterator[torch.Tensor]:
    """Segments that go on from prefixes, in runs of similar prefixes and similar lengths whose masks are bounded."""
    before = torch.zeros_like(chunk)
    for index, prefix in prefixes.items():
        before[index] = prefix.length
    members = torch.tensor(list(prefixes), dtype=torch.int64)
    for alike in _similar_runs(_longest_first(members, before), before):
        for run in _similar_runs(_longest_first(alike, chunk), chunk):
            longest = int(chunk[run[0]])
            yield from run.split(max(1, MASK_ELEMENTS // (longest * (longest + int(before[run].max())))))


def _seen_after_prefixes(before: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and mask of a `SegmentGroup` whose segments go on from prefixes.

    Args:
        before: [n, 2] start and length of each one's prefix.
        rows: [n, longest] its own rows.
    """
    start, length = before[:, :1], before[:, 1:]
    column = torch.arange(int(length.max()))
    keys = torch.cat((start + torch.minimum(column, length - 1), rows), dim=1)
    count, longest = rows.shape
    of_prefix = (column < length).unsqueeze(1).expand(count, longest, -1)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril().expand(count, -1, -1)
    return keys.flatten(), torch.cat((of_prefix, causal), dim=2).unsqueeze(1)


def _seen_keys(
    chunk: torch.Tensor, start: torch.Tensor, index: int, cut: ContextCut, own_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and mask of a `SegmentGroup` for the chunks `index` of some segments.

    Args:
        chunk: [n] tokens of a chunk of each segment, the longest first.
        start: [n] the segment's first row on each rank.
        index: number of the queries' chunk; they see the chunks up to it.
        cut: cut of the group.
        own_rows: rows of each rank.
    """
    longest = int(chunk[0])
    column = torch.arange((index + 1) * longest)
    position = torch.minimum(column, (index + 1) * chunk[:, None] - 1)
    held = position // chunk[:, None]
    second = held >= cut.size
    rank = torch.where(second, 2 * cut.size - 1 - held, held)
    keys = rank * own_rows + start[:, None] + second * chunk[:, None] + position % chunk[:, None]
    query = index * chunk[:, None] + torch.minimum(torch.arange(longest), chunk[:, None] - 1)
    return keys.flatten(), (column <= query[:, :, None]).unsqueeze(1)


def _longest_first(members: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    return members[torch.argsort(length[members], descending=True, stable=True)]


def _similar_runs(by_length: torch.Tensor, length: torch.Tensor) -> list[torch.Tensor]:
    """Cut indices sorted by falling length wherever the length falls below SIMILAR of the run's first."""
    runs: list[list[int]] = []
    for index in by_length.tolist():
        if runs and length[index] >= SIMILAR * length[runs[-1][0]]:
            runs[-1].append(index)
        else:
            runs.append([index])
    return [torch.tensor(run) for run in runs]
