"""The cut over context-parallel ranks: every token is one rank's, work is equal, targets and keys are found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropic.policy.batch.microbatch import PackingRules, pack_one
from megatron_entropic.policy.batch.segments import ContextCut, plan_segments
from megatron_entropic.types import Sequence

SIZES = st.sampled_from([2, 3, 4])


def cuts(size: int) -> list[ContextCut]:
    return [ContextCut(rank, size) for rank in range(size)]


def test_the_picture_of_the_module_docstring():
    assert [cut.rows(torch.tensor([8])).tolist() for cut in cuts(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert cuts(2)[1].positions(torch.tensor([4, 8])).tolist() == [1, 2, 2, 3, 4, 5]
    assert ContextCut().rows(torch.tensor([2, 3])).tolist() == [0, 1, 2, 3, 4]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), SIZES)
def test_every_row_is_one_ranks_and_all_ranks_have_the_same_attention_work(chunks, size):
    lengths = torch.tensor(chunks) * 2 * size
    rows = [cut.rows(lengths) for cut in cuts(size)]
    assert sorted(torch.cat(rows).tolist()) == list(range(int(lengths.sum())))
    assert len({int((cut.positions(lengths) + 1).sum()) for cut in cuts(size)}) == 1


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), SIZES)
def test_a_query_sees_the_keys_up_to_its_own_position_and_no_others(chunks, size):
    lengths = torch.tensor(chunks) * 2 * size
    rows_of_keys = torch.cat([cut.rows(lengths) for cut in cuts(size)])
    first_row = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    for cut in cuts(size):
        own = cut.rows(lengths)
        plan = plan_segments(lengths.tolist(), cut)
        assert torch.cat([group.rows for group in plan.groups])[plan.order].tolist() == list(range(own.numel()))
        for group in plan.groups:
            queries, keys = own[group.rows].view(group.count, -1), rows_of_keys[group.keys].view(group.count, -1)
            for item in range(group.count):
                for query, visible in zip(queries[item].tolist(), group.mask[item, 0], strict=True):
                    assert keys[item][visible].tolist() == list(range(int(first_row[query]), query + 1))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_out_the_targets_of_the_whole_micro_batch(size):
    sequences = [Sequence(torch.arange(10 * i, 10 * i + length), prompt) for i, (length, prompt) in enumerate(
        [(9, 3), (2, 1), (7, 6)]
    )]  # fmt: skip
    whole = pack_one(sequences, [0, 1, 2])
    found = torch.full_like(whole.targets, -1)
    for cut in cuts(size):
        part = pack_one(sequences, [0, 1, 2], PackingRules(3, cut))
        assert part.tokens.numel() % 3 == 0
        assert part.response_tokens == whole.targets.numel()
        # A row predicts the token after its own, on whichever rank that is.
        assert torch.equal(part.tokens[0, part.rows] + 1, part.targets)
        assert torch.equal(part.places(slice(None)), part.owned)
        found[part.owned] = part.targets
    assert torch.equal(found, whole.targets)
