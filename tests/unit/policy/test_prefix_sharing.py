"""Prompts that are laid once: what is laid, what each token sees, and how sequences are dealt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.policy.batch import segments
from megatron_entropic.policy.batch.microbatch import MicroBatch, PackingRules, pack, pack_one
from megatron_entropic.policy.batch.prefix_sharing import FINEST, LEVEL, deal, laid_tokens, shares_prefixes
from megatron_entropic.policy.megatron.rotary import apply_rotary_packed
from megatron_entropic.types import Sequence

SHARED = PackingRules(share_prefixes=True)
SEQUENCES = st.lists(st.tuples(st.sampled_from([1, 2, 3, 9]), st.integers(1, 12)), min_size=1, max_size=14)
"""Length of a prompt, which is its name too, and of a response."""


def sequences_of(lengths: list[tuple[int, int]]) -> list[Sequence]:
    return [
        Sequence(torch.tensor([*range(100 * prompt, 101 * prompt), *range(1000 * i, 1000 * i + response)]), prompt)
        for i, (prompt, response) in enumerate(lengths)
    ]


def test_the_picture_of_the_module_docstring():
    prompt = [10, 11, 12]
    first, second = Sequence(torch.tensor([*prompt, 20, 21]), 3), Sequence(torch.tensor([*prompt, 30]), 3)

    batch = pack_one([first, second], [0, 1], PackingRules(token_multiple=4, share_prefixes=True))

    assert batch.tokens.tolist() == [[10, 11, 12, 20, 21, 12, 30, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 8]
    assert batch.first_positions.tolist() == [0, 2, 0]
    assert batch.rows.tolist() == [2, 3, 5]
    assert batch.targets.tolist() == [20, 21, 30]
    assert sum(batch.left_out) == 2
    assert batch.max_seqlen == 5


def test_prompts_of_one_token_have_nothing_to_share():
    batch = pack_one(sequences_of([(1, 2), (1, 3)]), [0, 1], SHARED)
    assert batch.tokens.numel() == 7
    assert batch.first_positions is None


def test_rows_of_what_the_policy_wrote_are_found_behind_a_prompt_that_is_not_laid():
    prompt, mask = [5, 6, 7], torch.tensor([True, False, False, True])
    sequences = [Sequence(torch.tensor([*prompt, *range(n, n + 4)]), 3, mask=mask) for n in (10, 20)]
    batch = pack_one(sequences, [0, 1], SHARED)
    assert batch.targets.tolist() == [10, 13, 20, 23]
    assert torch.equal(batch.tokens[0, batch.rows + 1], batch.targets)


def seen_tokens(batch: MicroBatch) -> dict[int, list[int]]:
    """By laid row: the tokens that its query sees, in the order of their positions."""
    tokens, positions = batch.tokens[0], batch.position_ids[0]
    seen: dict[int, list[int]] = {}
    for group in batch.plan.groups:
        queries = group.rows.view(group.count, group.length)
        keys = (group.rows if group.keys is None else group.keys).view(group.count, -1)
        for item in range(group.count):
            for place, query in enumerate(queries[item].tolist()):
                visible = keys[item][: place + 1] if group.mask is None else keys[item][group.mask[item, 0, place]]
                # A place of padding repeats the last row and sees more; the first of its places is the real one.
                seen.setdefault(query, tokens[visible].tolist())
                assert positions[visible].tolist()[: int(positions[query]) + 1] == list(
                    range(int(positions[query]) + 1)
                )
    return seen


@given(SEQUENCES, st.sampled_from([2**24, 20]))
def test_every_token_sees_its_own_sequence_up_to_itself(lengths, mask_elements):
    sequences = sequences_of(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "MASK_ELEMENTS", mask_elements)
        batch = pack_one(sequences, list(range(len(sequences))), SHARED)
    seen = seen_tokens(batch)
    rows = iter(batch.rows.tolist())
    for sequence in sequences:
        for end in range(sequence.prompt_length, sequence.tokens.numel()):
            assert seen[next(rows)] == sequence.tokens[:end].tolist()
    outputs = torch.cat([group.rows for group in batch.plan.groups])
    assert outputs[batch.plan.order].tolist() == list(range(batch.tokens.numel()))


@given(SEQUENCES, st.integers(1, 60), st.integers(1, 9))
def test_micro_batches_hold_every_sequence_once_within_the_budget(lengths, budget, at_least):
    sequences = sequences_of(lengths)
    needed = len(pack(sequences, budget, SHARED))
    batches = pack(sequences, budget, SHARED, at_least=at_least)
    assert len(batches) == max(needed, at_least)
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(lengths)))
    for batch in batches:
        assert batch.tokens.numel() <= budget or len(batch.sequences) <= 1


def test_responses_to_one_prompt_lie_in_one_micro_batch():
    sequences = sequences_of([(9, 3), (8, 3), (7, 3)] * 4)
    batches = pack(sequences, 25, SHARED)
    assert sorted(sorted(batch.indices) for batch in batches) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_interleaved_stages_get_micro_batches_of_one_length():
    rules = PackingRules(token_multiple=3, count_multiple=4, equal_tokens=True, share_prefixes=True)
    batches = pack(sequences_of([(9, 3), (3, 10)] * 4), 30, rules)
    assert len(batches) % 4 == 0
    assert len({batch.tokens.numel() for batch in batches}) == 1


@given(SEQUENCES, st.integers(1, 4))
def test_a_deal_keeps_prompts_together_and_replicas_level(lengths, replicas):
    sequences = sequences_of(lengths)
    shards = deal(sequences, 0.0, replicas, shared=True)
    assert sorted(index for shard in shards for index in shard) == list(range(len(lengths)))
    assert all(shard == sorted(shard) for shard in shards)
    loads = [laid_tokens([sequences[i] for i in shard]) for shard in shards]
    part = max([sum(loads) / (FINEST * replicas) + 1, *(sequence.tokens.numel() for sequence in sequences)])
    assert max(loads) - min(loads) <= 2 * part or max(loads) * replicas <= LEVEL * sum(loads)


def test_a_deal_of_groups_gives_each_replica_whole_groups():
    sequences = sequences_of([(9 + n % 4, 2) for n in range(32)])
    for shard in deal(sequences, 0.0, 2, shared=True):
        assert len({sequences[index].prompt_length for index in shard}) == 2


def test_attention_and_its_gradients_equal_those_of_whole_sequences():
    from megatron_entropic.policy.model.attention import PackedSegments, SegmentedAttention

    sequences = sequences_of([(9, 4), (3, 20), (9, 1), (9, 13), (3, 19), (2, 2), (9, 12)])
    shared = pack_one(sequences, list(range(7)), SHARED)
    whole = pack_one(sequences, list(range(7)))
    heads, groups, width = 6, 2, 22
    generator = torch.Generator().manual_seed(3)
    of_token = [torch.randn(10_000, count, width, generator=generator) for count in (heads, groups, groups)]
    incoming = torch.randn(whole.targets.numel(), heads * width, generator=generator)
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=width)
    attention = SegmentedAttention(config, layer_number=1, attn_mask_type=None)
    results = []
    for batch in (shared, whole):
        leaves = [values.clone().requires_grad_() for values in of_token]
        laid = [leaf[batch.tokens[0]] for leaf in leaves]
        output = attention(*laid, None, packed_seq_params=PackedSegments(plan=batch.plan))[batch.rows]
        results.append([output, *torch.autograd.grad(output, leaves, incoming)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=3e-6)


def test_rotation_goes_on_from_the_prefix():
    from megatron_entropic.policy.model.attention import packed_segments

    batch = pack_one(sequences_of([(9, 4), (3, 6), (9, 5)]), [0, 1, 2], SHARED)
    angles = torch.randn(30, 1, 1, 8, generator=torch.Generator().manual_seed(1))
    heads = torch.ones(batch.tokens.numel(), 2, 8)
    one_rank = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    rotated = apply_rotary_packed(heads, packed_segments(batch).cu_seqlens_q_padded, angles, cp_group=one_rank)
    whole = apply_rotary_packed(
        torch.ones(30, 2, 8), torch.tensor([0, 30], dtype=torch.int32), angles, cp_group=one_rank
    )
    assert torch.equal(rotated, F.embedding(batch.position_ids[0], whole.flatten(1)).unflatten(1, (2, 8)))


DENSE = SimpleNamespace(experts=None)


@pytest.mark.parametrize(
    ("policy", "dimensions", "on_cpu", "shares"),
    [
        ({}, DENSE, True, True),
        ({}, DENSE, False, False),
        ({"prefix_sharing": "off"}, DENSE, True, False),
        ({"context_parallel": 2}, DENSE, True, False),
        ({}, SimpleNamespace(experts=object()), True, False),
    ],
)
def test_prompts_are_shared_where_attention_is_ours(policy, dimensions, on_cpu, shares):
    assert shares_prefixes(PolicyConfig(**policy), dimensions, on_cpu=on_cpu) is shares
