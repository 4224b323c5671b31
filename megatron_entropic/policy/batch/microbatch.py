"""Packs sequences of different lengths into micro-batches without padding between them.

Shapes: T packed tokens of a micro-batch (padding tail included), R response tokens in it, n sequences.

    tokens      p0 p1 r0 r1 | p0 r0 r1 r2 | pad      T = 9 with the multiple 3
    rows              1  2       4  5  6             the positions whose logits predict a response token
    targets           r0 r1      r0 r1 r2            R = 5, sequence after sequence

Where a prompt is computed once for several responses, later ones leave it out (see `prefix_sharing`).

Under context parallelism each segment is padded and cut (see `segments`), and a rank's micro-batch holds its own
part of the tokens. All ranks of a group pack the same sequences, so each knows the target of a row whose next token is
held by another.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch

from megatron_entropic.policy.batch.balance import spread
from megatron_entropic.policy.batch.host_copies import to_device
from megatron_entropic.policy.batch.prefix_sharing import (
    by_prompt,
    laid_tokens,
    prompt_owners,
    shared_tokens,
    within,
)
from megatron_entropic.policy.batch.segments import WHOLE, ContextCut, Prefix, SegmentPlan, plan_segments
from megatron_entropic.types import Sequence

TAIL_TOKENS = 64
"""Length of the segments of a padding tail: attention over them costs nothing."""


@dataclass(frozen=True)
class PackingRules:
    """Rules of a layout for micro-batches (`ParallelState.packing`)."""

    token_multiple: int = 1
    """Number that the padded tokens of each rank are a multiple of."""
    cut: ContextCut = WHOLE
    """Part of each sequence that this rank holds."""
    count_multiple: int = 1
    """Number that the count of micro-batches is a multiple of."""
    equal_tokens: bool = False
    """Whether all micro-batches of a pass are padded to one length."""
    share_prefixes: bool = False
    """Whether sequences of one prompt lay it once; not with a cut."""

    @property
    def total_multiple(self) -> int:
        """Number that the padded tokens of all context-parallel ranks together are a multiple of."""
        return self.token_multiple * self.cut.segment_multiple


NO_RULES = PackingRules()


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences laid end to end, with what the last stage needs to give statistics of the response tokens."""

    tokens: torch.Tensor
    """Token ids, [1, T] int64; under context parallelism this rank's [1, T / size]."""
    position_ids: torch.Tensor
    """Position of each token in its sequence, from 0, in the shape of `tokens`."""
    cu_seqlens: torch.Tensor
    """Starts of the segments before the cut, and T: [segments + 1] int32. A padding tail is the last segments."""
    rows: torch.Tensor
    """Places in `tokens` whose logits predict the response tokens, in the order of `targets`, [R] int64."""
    targets: torch.Tensor
    """Response tokens of all sequences, one sequence after the other, [R] int64."""
    owned: torch.Tensor | None
    """Indices among the R of this rank's [r] `rows` and `targets` under context parallelism; None without it."""
    plan: SegmentPlan
    """Plan by which core attention batches the segments, computed once for all layers.

    It stays where it is: Transformer Engine's attention never looks at it.
    """
    max_seqlen: int
    """Number of tokens of the longest segment, before the cut, with the prefix that it goes on from."""
    response_lengths: tuple[int, ...]
    """Number of response tokens of each sequence; they sum to R."""
    sequences: tuple[Sequence, ...]
    """The sequences themselves, as the caller gave them (on the caller's device)."""
    indices: tuple[int, ...]
    """Index of each sequence in the caller's list."""
    first_positions: torch.Tensor | None = None
    """Position of the first token of each segment, [segments] int32; None: all of them are 0."""
    choices: torch.Tensor | None = None
    """Experts to use, [tokens of this rank, layers with experts, k], see `router_replay`. None: routers choose."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its packed tensors on `device`; `plan` and `sequences` stay where they are."""
        moved: dict[str, Any] = {
            field.name: to_device(getattr(self, field.name), device)
            for field in fields(self)
            if isinstance(getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)

    @property
    def response_tokens(self) -> int:
        """Number of response tokens, R, over all context-parallel ranks."""
        return sum(self.response_lengths)

    @property
    def left_out(self) -> list[int]:
        """Numbers of tokens that its sequences leave out, because another's prompt stands for them; [] if none does."""
        return [] if self.first_positions is None else self.first_positions.tolist()

    def places(self, targets: slice) -> slice | torch.Tensor:
        """Indices among the R response tokens of some of this rank's `targets`."""
        return targets if self.owned is None else self.owned[targets]

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Cut a [R] tensor into one tensor for each sequence."""
        return list(values.split(list(self.response_lengths)))


def pack(
    sequences: list[Sequence], tokens_per_microbatch: int, rules: PackingRules = NO_RULES, *, at_least: int = 1
) -> list[MicroBatch]:
    """Distribute sequences over as few micro-batches as first-fit decreasing needs, of close lengths; deterministic.

    Args:
        sequences: sequences, each with at least one prompt and one response token.
        tokens_per_microbatch: budget of one micro-batch, over its context-parallel ranks; a longer sequence gets one
            of its own.
        rules: rules of the layout.
        at_least: number of micro-batches wanted at least, so that data-parallel ranks can agree on one number; those
            for which there is no sequence left hold padding only and R = 0.

    Raises:
        ValueError: a sequence without prompt or response.
    """
    units = _units(sequences, tokens_per_microbatch, rules)
    lengths = [_laid_tokens([sequences[i] for i in unit], rules) for unit in units]
    groups_of_units = first_fit_decreasing(lengths, tokens_per_microbatch)
    count = _rounded_up(max(len(groups_of_units), at_least), rules.count_multiple)
    level = spread(lengths, count)
    # Stages of a pipeline wait for the longest one. A level deal may exceed the budget where first fit does not.
    if all(len(group) == 1 or sum(lengths[i] for i in group) <= tokens_per_microbatch for group in level):
        groups_of_units = level
    groups = [[index for unit in group for index in units[unit]] for group in groups_of_units]
    groups = [group for group in groups if group]
    whole = [sequence.tokens.numel() for sequence in sequences]
    while len(groups) < count:
        groups = _halve_largest(groups, whole)
    longest = max(_laid_tokens([sequences[i] for i in group], rules) for group in groups) if rules.equal_tokens else 0
    return [pack_one([sequences[i] for i in group], group, rules, at_least_tokens=longest) for group in groups]


def _units(sequences: list[Sequence], budget: int, rules: PackingRules) -> list[list[int]]:
    """Indices of the sequences that stay together: those of one prompt within the budget, or each by itself."""
    if not rules.share_prefixes:
        return [[index] for index in range(len(sequences))]
    return [run for unit in by_prompt(sequences) for run in within(unit, sequences, budget)]


def _laid_tokens(sequences: list[Sequence], rules: PackingRules) -> int:
    """Number of tokens of these sequences in one micro-batch, without its tail."""
    if rules.share_prefixes:
        return laid_tokens(sequences)
    return sum(_rounded_up(sequence.tokens.numel(), rules.cut.segment_multiple) for sequence in sequences)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def first_fit_decreasing(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in groups whose sums stay within `budget`; an item over the budget is alone in its group.

    Within a group lengths fall; ties keep the order given.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((i for i, free in enumerate(room) if lengths[index] <= free), len(groups))
        if place == len(groups):
            groups.append([])
            room.append(budget)
        groups[place].append(index)
        room[place] -= lengths[index]
    return groups


def _halve_largest(groups: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Split the fullest group that holds several items in two of similar size; add an empty one if none does."""
    divisible = [group for group in groups if len(group) > 1]
    if not divisible:
        return [*groups, []]
    fullest = max(divisible, key=lambda group: sum(lengths[i] for i in group))
    halves: tuple[list[int], list[int]] = ([], [])
    for index in fullest:
        min(halves, key=lambda half: sum(lengths[i] for i in half)).append(index)
    place = groups.index(fullest)
    return [*groups[:place], *halves, *groups[place + 1 :]]


def pack_one(
    sequences: list[Sequence], indices: list[int], rules: PackingRules = NO_RULES, *, at_least_tokens: int = 0
) -> MicroBatch:
    """Make one micro-batch of these sequences, in this order.

    Args:
        sequences: sequences, each with at least one prompt and one response token; may be empty.
        indices: index of each in the caller's list, to find its statistics again.
        rules: rules of the layout; how many micro-batches there are does not matter here.
        at_least_tokens: number of tokens that T is padded to, and to at least 1.

    Raises:
        ValueError: a sequence without prompt or response.
    """
    bad = [i for i, s in zip(indices, sequences, strict=True) if s.prompt_length < 1 or s.response_length < 1]
    if bad:
        raise ValueError(f"sequences {bad} lack a prompt or a response token, so they have nothing to score")
    cut = rules.cut
    owners = prompt_owners(sequences) if rules.share_prefixes else {}
    left_out = [shared_tokens(s) if i in owners else 0 for i, s in enumerate(sequences)]
    laid = [sequence.tokens[skipped:] for sequence, skipped in zip(sequences, left_out, strict=True)]
    segments = _segments([tokens.numel() for tokens in laid], rules, at_least_tokens)
    starts = [0, *accumulate(segments)]
    tokens = torch.zeros(starts[-1], dtype=torch.int64)
    for of_sequence, start in zip(laid, starts, strict=False):
        tokens[start : start + of_sequence.numel()] = of_sequence
    rows_of_all = [
        start - skipped + s.response_places - 1  # logits predict the token after theirs
        for s, start, skipped in zip(sequences, starts, left_out, strict=False)
    ]
    rows = torch.cat([torch.empty(0, dtype=torch.int64), *rows_of_all])
    lengths = torch.tensor(segments)
    own_rows = cut.rows(lengths)
    place, owned = _own_places(rows, own_rows, starts[-1]) if cut.size > 1 else (rows, None)
    position_ids = cut.positions(lengths)
    first_positions = None
    if owners:
        first_positions = torch.tensor([*left_out, *[0] * (len(segments) - len(left_out))], dtype=torch.int32)
        position_ids += first_positions.repeat_interleave(lengths)
    return MicroBatch(
        tokens=tokens[own_rows].unsqueeze(0),
        position_ids=position_ids.unsqueeze(0),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        rows=place,
        targets=tokens[(rows if owned is None else rows[owned]) + 1],
        owned=owned,
        plan=plan_segments(segments, cut, {i: Prefix(starts[owner], left_out[i]) for i, owner in owners.items()}),
        max_seqlen=max(segments) if first_positions is None else int((lengths + first_positions).max()),
        response_lengths=tuple(s.response_length for s in sequences),
        sequences=tuple(sequences),
        indices=tuple(indices),
        first_positions=first_positions,
    )


def _segments(lengths: list[int], rules: PackingRules, at_least_tokens: int) -> list[int]:
    """Padded lengths of the sequences, then of the tail."""
    multiple = rules.cut.segment_multiple
    segments = [_rounded_up(length, multiple) for length in lengths]
    padding = _rounded_up(max(sum(segments), at_least_tokens, 1), rules.total_multiple) - sum(segments)
    whole, rest = divmod(padding, _rounded_up(TAIL_TOKENS, multiple))
    return [*segments, *[_rounded_up(TAIL_TOKENS, multiple)] * whole, *([rest] if rest else [])]


def _own_places(rows: torch.Tensor, own_rows: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in `own_rows` of those `rows` that are among them, and the indices of these in `rows`."""
    place = torch.full((total,), -1)
    place[own_rows] = torch.arange(own_rows.numel())
    owned = (place[rows] >= 0).nonzero().squeeze(1)
    return place[rows[owned]], owned
