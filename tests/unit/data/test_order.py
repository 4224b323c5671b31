"""The order of prompts: every row once an epoch, and the same wherever one starts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_entropic.data.order import EpochOrder

SIZES = st.integers(1, 200)
SEEDS = st.integers(0, 2**63)


@settings(deadline=None)
@given(SIZES, SEEDS, st.integers(0, 20), st.booleans())
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int, shuffle: bool) -> None:
    rows = EpochOrder(size, seed=seed, shuffle=shuffle).rows(epoch * size, size)
    assert sorted(rows) == list(range(size))


@settings(deadline=None)
@given(SIZES, SEEDS, st.integers(0, 500), st.integers(1, 300), st.lists(st.integers(0, 1000), max_size=5))
def test_a_slice_does_not_depend_on_what_was_asked_before(
    size: int, seed: int, first: int, count: int, asked_before: list[int]
) -> None:
    """Resuming at any position continues the order of an uninterrupted run."""
    whole = EpochOrder(size, seed=seed).rows(0, first + count)
    resumed = EpochOrder(size, seed=seed)
    for position in asked_before:
        resumed.rows(position, 3)
    assert resumed.rows(first, count) == whole[first:]


def test_epochs_and_seeds_differ() -> None:
    order = EpochOrder(100, seed=1)
    assert order.rows(0, 100) != order.rows(100, 100)
    assert order.rows(0, 100) != EpochOrder(100, seed=2).rows(0, 100)
    assert EpochOrder(100, seed=0).rows(0, 100) != EpochOrder(100, seed=2**32).rows(0, 100)
    assert EpochOrder(5, seed=1, shuffle=False).rows(3, 4) == [3, 4, 0, 1]


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    """A checkpoint holds only the step, so these numbers may never change."""
    assert EpochOrder(10, seed=1).rows(8, 6) == [5, 8, 0, 4, 3, 7]


def test_an_empty_data_set_has_no_order() -> None:
    with pytest.raises(ValueError, match="empty"):
        EpochOrder(0, seed=1)
