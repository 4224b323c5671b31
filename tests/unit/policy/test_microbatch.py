"""Packing: every response token is scored from the right row, and no budget or order is lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropic.policy.batch.microbatch import TAIL_TOKENS, PackingRules, first_fit_decreasing, pack, pack_one
from megatron_entropic.policy.batch.segments import ContextCut
from megatron_entropic.types import Sequence


def sequence(prompt: int, response: int, start: int = 1) -> Sequence:
    return Sequence(torch.arange(start, start + prompt + response), prompt)


def test_the_layout_of_the_module_docstring():
    first, second = sequence(2, 2, start=10), sequence(1, 3, start=20)

    batch = pack_one([first, second], [4, 7], PackingRules(token_multiple=3))

    assert batch.tokens.tolist() == [[10, 11, 12, 13, 20, 21, 22, 23, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0]]
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 9]
    assert batch.cu_seqlens.dtype is torch.int32
    assert batch.rows.tolist() == [1, 2, 4, 5, 6]
    assert batch.targets.tolist() == [12, 13, 21, 22, 23]
    assert batch.response_lengths == (2, 3)
    assert batch.max_seqlen == 4
    assert batch.indices == (4, 7)
    assert [part.tolist() for part in batch.split(torch.arange(5))] == [[0, 1], [2, 3, 4]]


def test_no_padding_where_none_is_needed():
    batch = pack_one([sequence(2, 2)], [0], PackingRules(token_multiple=2))
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert batch.tokens.shape == (1, 4)


def test_a_micro_batch_without_sequences_is_padding_only():
    batch = pack_one([], [], PackingRules(token_multiple=2))
    assert batch.tokens.tolist() == [[0, 0]]
    assert batch.rows.numel() == batch.targets.numel() == 0
    assert batch.rows.dtype is torch.int64
    assert batch.split(torch.empty(0)) == []


def test_to_moves_every_packed_tensor():
    moved = pack_one([sequence(2, 3)], [0]).to(torch.device("meta"))
    tensors = [moved.tokens, moved.position_ids, moved.cu_seqlens, moved.rows, moved.targets]
    assert {t.device.type for t in tensors} == {"meta"}
    assert moved.sequences[0].tokens.device.type == "cpu"
    assert moved.plan.order.device.type == "cpu", "it moves when an attention asks for it, which most never do"
    plan = moved.plan.to(torch.device("meta"))
    assert {t.device.type for t in [plan.order, *(group.rows for group in plan.groups)]} == {"meta"}


def test_sequences_with_nothing_to_score_are_all_named():
    batch = [sequence(2, 2), sequence(3, 0), sequence(1, 1), sequence(0, 3)]
    with pytest.raises(ValueError, match=r"sequences \[1, 3\] lack a prompt or a response"):
        pack(batch, 100)


def test_a_sequence_over_the_budget_goes_alone():
    batches = pack([sequence(5, 20), sequence(1, 2), sequence(2, 2)], 8)
    assert sorted(batch.indices for batch in batches) == [(0,), (2, 1)]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_first_fit_keeps_every_item_once_within_the_budget(lengths, budget):
    groups = first_fit_decreasing(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= budget
    # Any two groups overflow one: otherwise the later one's items would have fitted the earlier.
    sizes = [sum(lengths[i] for i in group) for group in groups]
    assert all(a + b > budget for a, b in pairwise(sizes))


@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.integers(1, 30))
def test_at_least_is_exact_when_more_are_wanted_than_needed(lengths, at_least):
    sequences = [sequence(1, length - 1) for length in lengths]
    needed = len(pack(sequences, 40))
    batches = pack(sequences, 40, PackingRules(token_multiple=2), at_least=at_least)
    assert len(batches) == max(needed, at_least)
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(lengths)))
    assert all(batch.tokens.numel() % 2 == 0 for batch in batches)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.sampled_from([ContextCut(), ContextCut(1, 2)]))
def test_interleaved_stages_get_groups_of_equal_micro_batches(lengths, cut):
    rules = PackingRules(token_multiple=3, cut=cut, count_multiple=4, equal_tokens=True)
    batches = pack([sequence(1, length - 1) for length in lengths], 40, rules)
    assert len(batches) % 4 == 0
    assert len({batch.tokens.numel() for batch in batches}) == 1
    assert batches[0].tokens.numel() % 3 == 0
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(lengths)))
    assert all(batch.max_seqlen <= max(40, TAIL_TOKENS) for batch in batches)


def test_micro_batches_have_close_lengths():
    # First fit alone would leave 40 + 40 + 20.
    batches = pack([sequence(1, 4)] * 20, 40)
    assert sorted(batch.tokens.numel() for batch in batches) == [30, 35, 35]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30))
def test_level_micro_batches_stay_within_the_budget_and_are_no_more(lengths):
    batches = pack([sequence(1, length - 1) for length in lengths], 40)
    assert len(batches) == len(first_fit_decreasing(lengths, 40))
    assert all(batch.tokens.numel() <= 40 for batch in batches)
