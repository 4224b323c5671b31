"""How sequences are dealt to replicas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropic.planning.parameters import KNOWN_MODELS, read_model
from megatron_entropic.policy.batch.balance import attention_weight, data_parallel_shards, sequence_costs

LENGTHS = st.lists(st.integers(1, 5000), max_size=200)


@given(LENGTHS, st.integers(1, 16))
def test_every_sequence_is_dealt_once_and_loads_are_close(lengths, replicas):
    shards = data_parallel_shards(lengths, replicas)
    assert len(shards) == replicas
    assert sorted(index for shard in shards for index in shard) == list(range(len(lengths)))
    assert all(shard == sorted(shard) for shard in shards)
    loads = [sum(lengths[index] for index in shard) for shard in shards]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_equal_lengths_are_dealt_evenly():
    assert data_parallel_shards([7] * 6, 3) == [[0, 3], [1, 4], [2, 5]]


def test_long_sequences_come_first():
    # Dealt in order, the long one would come on top of a full load: 1 + 1 + 10 against 1 + 1.
    assert data_parallel_shards([1, 1, 1, 1, 10], 2) == [[4], [0, 1, 2, 3]]


def test_replicas_may_be_empty():
    assert data_parallel_shards([3], 3) == [[0], [], []]


def test_no_replica_is_an_error():
    with pytest.raises(ValueError, match="data_parallel must be at least 1"):
        data_parallel_shards([1], 0)


def test_long_sequences_weigh_more_than_their_tokens():
    weight = attention_weight(read_model(KNOWN_MODELS / "Qwen3-8B.json", "Qwen3-8B").dimensions)
    # 36 layers of width 4096 over 7.6e9 parameters in products.
    assert weight == pytest.approx(36 * 4096 / 7.568e9, rel=0.01)
    lengths = [16384, *[1024] * 20]
    assert len(data_parallel_shards(sequence_costs(lengths, 0.0), 2)[0]) == 3
    assert data_parallel_shards(sequence_costs(lengths, weight), 2)[0] == [0]
