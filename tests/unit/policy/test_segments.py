"""Batching of attention over segments: nothing lost, little padding, same numbers as one segment at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropic.policy.batch.segments import SIMILAR, plan_segments


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_a_plan_finds_every_row_again_and_pads_little(lengths):
    plan = plan_segments(lengths)
    outputs = torch.cat([group.rows for group in plan.groups])
    assert outputs[plan.order].tolist() == list(range(sum(lengths)))
    assert outputs.numel() * SIMILAR <= sum(lengths)
    # Lengths fall by a quarter from group to group, so there are few.
    assert len(plan.groups) <= 14


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_each_place_of_a_batch_is_a_row_of_one_segment_in_order(lengths):
    segment_of_row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    for group in plan_segments(lengths).groups:
        rows = group.rows.view(group.count, group.length)
        assert (segment_of_row[rows] == segment_of_row[rows[:, :1]]).all()
        assert (rows.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("lengths", [[7], [5, 17, 1, 30, 11], [3] * 9, [40, 1, 1, 39, 2]])
def test_attention_and_its_gradients_equal_those_of_single_segments(lengths):
    from megatron_entropic.policy.model.attention import PackedSegments, SegmentedAttention

    heads, groups, head_dim, total = 6, 2, 22, sum(lengths)
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(total, count, head_dim, generator=generator, requires_grad=True)
        for count in (heads, groups, groups)
    )
    weights = torch.randn(total, heads * head_dim, generator=generator)
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=head_dim)
    attention = SegmentedAttention(config, layer_number=1, attn_mask_type=None)

    output = attention(query, key, value, None, packed_seq_params=PackedSegments(plan=plan_segments(lengths)))
    gradients = torch.autograd.grad((output * weights).sum(), (query, key, value))
    expected = torch.cat(
        [
            _attend_to_one(*parts, scale=head_dim**-0.5)
            for parts in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
    )
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (query, key, value))

    torch.testing.assert_close(output, expected.flatten(1), rtol=0, atol=2e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5)


def _attend_to_one(query, key, value, scale):
    """Causal attention of one segment, written out in float64."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1).double(), value.repeat_interleave(repeats, 1).double()
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * scale
    length = query.shape[0]
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    return torch.einsum("hqk,khd->qhd", F.softmax(scores, -1), value).float().flatten(1)
