"""The order of prompts: every row once an epoch, and the same wherever one starts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_entropic.data.order import Arrangement, EpochOrder, as_stored, easy_to_hard, shuffled

SIZES = st.integers(1, 200)
SEEDS = st.integers(0, 2**63)
RATES = st.lists(st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=200)
ARRANGEMENTS = SIZES.map(shuffled) | SIZES.map(as_stored) | st.builds(easy_to_hard, RATES, st.floats(0, 3))


def size_of(arrangement: Arrangement) -> int:
    return len(arrangement(np.random.RandomState(0)))


@settings(deadline=None)
@given(ARRANGEMENTS, SEEDS, st.integers(0, 20))
def test_each_epoch_is_a_permutation(arrangement: Arrangement, seed: int, epoch: int) -> None:
    size = size_of(arrangement)
    rows = EpochOrder(size, arrangement, seed=seed).rows(epoch * size, size)
    assert sorted(rows) == list(range(size))


@settings(deadline=None)
@given(ARRANGEMENTS, SEEDS, st.integers(0, 500), st.integers(1, 300), st.lists(st.integers(0, 1000), max_size=5))
def test_a_slice_does_not_depend_on_what_was_asked_before(
    arrangement: Arrangement, seed: int, first: int, count: int, asked_before: list[int]
) -> None:
    """Resuming at any position continues the order of an uninterrupted run."""
    size = size_of(arrangement)
    whole = EpochOrder(size, arrangement, seed=seed).rows(0, first + count)
    resumed = EpochOrder(size, arrangement, seed=seed)
    for position in asked_before:
        resumed.rows(position, 3)
    assert resumed.rows(first, count) == whole[first:]


def test_epochs_and_seeds_differ() -> None:
    for arrangement in (shuffled(100), easy_to_hard([number / 100 for number in range(100)], 0.2)):
        order = EpochOrder(100, arrangement, seed=1)
        assert order.rows(0, 100) != order.rows(100, 100)
        assert order.rows(0, 100) != EpochOrder(100, arrangement, seed=2).rows(0, 100)
        zero, large = (EpochOrder(100, arrangement, seed=seed).rows(0, 100) for seed in (0, 2**32))
        assert zero != large
    assert EpochOrder(5, as_stored(5), seed=1).rows(3, 4) == [3, 4, 0, 1]


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    """A checkpoint holds only the step, so these numbers may never change."""
    assert EpochOrder(10, shuffled(10), seed=1).rows(8, 6) == [5, 8, 0, 4, 3, 7]
    rates = [0.5, None, 1.0, 0.0, 0.5, 0.25, None, 0.75, 0.0, 1.0]
    assert EpochOrder(10, easy_to_hard(rates, 0.4), seed=1).rows(8, 6) == [3, 8, 2, 9, 4, 7]


@settings(deadline=None)
@given(RATES, SEEDS, st.floats(0, 1))
def test_a_curriculum_goes_from_easy_to_hard_but_for_the_blur(
    rates: list[float | None], seed: int, blur: float
) -> None:
    rows = EpochOrder(len(rates), easy_to_hard(rates, blur), seed=seed).rows(0, len(rates))
    falling = sorted((rate for rate in rates if rate is not None), reverse=True)
    rank = {r: sum(i for i, x in enumerate(falling) if x == r) / falling.count(r) for r in falling}
    place = {r: value / max(1, len(falling) - 1) for r, value in rank.items()}
    seen = [place[rate] for row in rows if (rate := rates[row]) is not None]
    assert all(later >= earlier - blur - 1e-9 for i, earlier in enumerate(seen) for later in seen[i + 1 :])


def test_rows_without_a_rate_and_rows_of_one_rate_are_scattered() -> None:
    rates = [1.0] * 100 + [None] * 100 + [0.0] * 100
    for epoch in range(3):
        rows = EpochOrder(300, easy_to_hard(rates, 0.0), seed=4).rows(300 * epoch, 300)
        known = [row for row in rows if rates[row] is not None]
        assert sorted(known[:100]) == list(range(100))
        assert known[:100] != list(range(100))
        places = [place for place, row in enumerate(rows) if rates[row] is None]
        assert all(15 <= sum(first <= place < first + 75 for place in places) <= 35 for first in range(0, 300, 75))


def test_an_empty_data_set_has_no_order() -> None:
    with pytest.raises(ValueError, match="empty"):
        EpochOrder(0, shuffled(0), seed=1)
