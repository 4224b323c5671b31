"""How attention over packed segments is batched: segments of similar length run together, padded on the right.

A loop over 256 short segments spends its time starting kernels; one padded batch of all of them spends it on padding
when lengths differ. Groups in which the shortest is at least `SIMILAR` of the longest bound the padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SIMILAR = 0.75
"""Shortest over longest length within a group: at most a third more rows, and the same order of attention work."""


@dataclass(frozen=True)
class SegmentGroup:
    """Segments that run as one batch [count, length]."""

    rows: torch.Tensor
    """[count * length] int64: the packed row of each place of the batch; places of padding repeat a real row."""
    count: int
    length: int


@dataclass(frozen=True)
class SegmentPlan:
    """All groups, and how to put their outputs back in packed order."""

    groups: tuple[SegmentGroup, ...]
    order: torch.Tensor
    """[T] int64: for each packed row its place in the concatenated outputs of the groups."""

    def to(self, device: torch.device) -> SegmentPlan:
        """The same plan with its index tensors on `device`."""
        groups = tuple(SegmentGroup(g.rows.to(device), g.count, g.length) for g in self.groups)
        return SegmentPlan(groups, self.order.to(device))


def plan_segments(lengths: list[int]) -> SegmentPlan:
    """Groups segments, given by length in packed order, by similar length.

    Args:
        lengths: Tokens of each segment, all positive.
    """
    assert min(lengths) > 0, "an empty segment has no place in a plan"
    length = torch.tensor(lengths)
    start = length.cumsum(0) - length
    by_length = torch.argsort(length, descending=True, stable=True)
    groups = []
    order = torch.empty(int(length.sum()), dtype=torch.int64)
    offset = 0
    for members in _similar_runs(by_length, length):
        longest = int(length[members[0]])
        column = torch.arange(longest)
        # Padding repeats the segment's last row: finite values, which no real query sees under the causal mask.
        within = torch.minimum(column, length[members, None] - 1)
        rows = start[members, None] + within
        real = column < length[members, None]
        order[rows[real]] = offset + torch.arange(rows.numel()).view_as(rows)[real]
        groups.append(SegmentGroup(rows.flatten(), len(members), longest))
        offset += rows.numel()
    return SegmentPlan(tuple(groups), order)


def _similar_runs(by_length: torch.Tensor, length: torch.Tensor) -> list[torch.Tensor]:
    """Cuts indices sorted by falling length wherever the length falls below SIMILAR of the run's first."""
    runs: list[list[int]] = []
    for index in by_length.tolist():
        if runs and length[index] >= SIMILAR * length[runs[-1][0]]:
            runs[-1].append(index)
        else:
            runs.append([index])
    return [torch.tensor(run) for run in runs]
