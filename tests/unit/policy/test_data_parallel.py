"""How sequences are dealt to replicas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropic.policy.data_parallel import data_parallel_shards

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
