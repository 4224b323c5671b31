"""Batches of packed segments for attention: segments of similar length run together, padded on the right.

A loop over 256 short segments spends its time starting kernels; one padded batch of all of them spends it on padding
when lengths differ. Groups in which the shortest is at least `SIMILAR` of the longest bound the padding.

Under context parallelism a rank's queries are two chunks of each segment (see `ContextCut`), and keys and values those
of all ranks, one rank's after the other. Chunk j sees the segment's chunks 0 to j, so each chunk is a batch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

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


SIMILAR = 0.75
"""Shortest over longest length within a group: at most a third more rows, and the same order of attention work."""


@dataclass(frozen=True)
class SegmentGroup:
    """Segments, or one chunk of each, that run as one batch [count, length]."""

    rows: torch.Tensor
    """Packed row of each place of the batch, [count * length] int64; places of padding repeat a real row."""
    count: int
    length: int
    keys: torch.Tensor | None = None
    """Rows of keys and values in those of all context-parallel ranks, [count * seen] int64; None: `rows`."""
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


def plan_segments(lengths: list[int], cut: ContextCut = WHOLE) -> SegmentPlan:
    """Group segments, given by length in packed order, by similar length.

    Args:
        lengths: tokens of each segment, all positive; under context parallelism multiples of `cut.segment_multiple`.
        cut: this rank's part of them.
    """
    assert min(lengths) > 0, "an empty segment has no place in a plan"
    # Of a whole segment there is one chunk.
    chunk = torch.tensor(lengths) // cut.segment_multiple
    own = torch.tensor(lengths) // cut.size
    start = own.cumsum(0) - own
    by_length = torch.argsort(chunk, descending=True, stable=True)
    groups = []
    order = torch.empty(int(own.sum()), dtype=torch.int64)
    offset = 0
    for place, index in enumerate(cut.chunks):
        for members in _similar_runs(by_length, chunk):
            longest = int(chunk[members[0]])
            column = torch.arange(longest)
            # Padding repeats the chunk's last row: finite values, which no real query sees.
            within = torch.minimum(column, chunk[members, None] - 1)
            rows = (start + place * chunk)[members, None] + within
            real = column < chunk[members, None]
            order[rows[real]] = offset + torch.arange(rows.numel()).view_as(rows)[real]
            seen = _seen_keys(chunk[members], start[members], index, cut, order.numel()) if cut.size > 1 else ()
            groups.append(SegmentGroup(rows.flatten(), len(members), longest, *seen))
            offset += rows.numel()
    return SegmentPlan(tuple(groups), order)


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


def _similar_runs(by_length: torch.Tensor, length: torch.Tensor) -> list[torch.Tensor]:
    """Cut indices sorted by falling length wherever the length falls below SIMILAR of the run's first."""
    runs: list[list[int]] = []
    for index in by_length.tolist():
        if runs and length[index] >= SIMILAR * length[runs[-1][0]]:
            runs[-1].append(index)
        else:
            runs.append([index])
    return [torch.tensor(run) for run in runs]
