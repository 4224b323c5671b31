"""Order of the rows: a pure function of (seed, position), so resuming needs no state but the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_GOLDEN_RATIO = (5**0.5 - 1) / 2

Arrangement = Callable[[np.random.RandomState], np.ndarray]
"""Function that draws the order of an epoch, a permutation of 0, ..., size - 1, with this state as its only chance."""


def shuffled(size: int) -> Arrangement:
    """Arrangement in which every order is as likely as any other."""
    return lambda random: random.permutation(size)


def as_stored(size: int) -> Arrangement:
    """Arrangement that keeps the order of the rows, in every epoch."""
    return lambda random: np.arange(size)


def easy_to_hard(pass_rates: Sequence[float | None], blur: float) -> Arrangement:
    """Arrangement by falling pass rates, blurred anew in each epoch.

    A row's place is its rank among the recorded rates, from 0 to 1 with equal rates in the middle of their ranks, plus
    uniform noise in [-blur/2, blur/2]: rows whose ranks are further apart than `blur` keep their order, and a large
    blur comes close to `shuffled`. Rows of equal place are in random order; those without a rate are scattered over the
    whole epoch.
    """
    rates = np.array([np.nan if rate is None else rate for rate in pass_rates])
    known = np.flatnonzero(~np.isnan(rates))
    _, level, sizes = np.unique(-rates[known], return_inverse=True, return_counts=True)
    middles = np.cumsum(sizes) - (sizes - 1) / 2 - 1
    ranks = middles[level] / max(1, len(known) - 1)

    def arrangement(random: np.random.RandomState) -> np.ndarray:
        noise, places = random.random_sample(len(rates)), random.random_sample(len(rates))
        places[known] = ranks + blur * (noise[known] - 0.5)
        return np.lexsort((noise, places))

    return arrangement


class EpochOrder:
    """An endless order of some rows, epoch after epoch; each epoch visits every row once.

    An epoch's order is drawn from (seed, epoch). `RandomState` is used because NumPy promises never to change its
    streams (NEP 19), so an order outlives NumPy versions.
    """

    def __init__(self, size: int, arrangement: Arrangement, *, seed: int):
        """Order `size` rows, at least 1, which is the number that `arrangement` orders."""
        if size < 1:
            raise ValueError("cannot order an empty data set")
        self._size, self._arrangement, self._seed = size, arrangement, seed
        self._epoch = -1
        self._permutation = np.arange(size)

    def rows(self, first: int, count: int) -> list[int]:
        """Row numbers at positions first, ..., first + count - 1; a slice may go on into the next epoch.

        The same for the same arguments, whatever was asked before.
        """
        return [self._row(position) for position in range(first, first + count)]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self._size)
        if epoch != self._epoch:
            self._permutation = self._permutation_of(epoch)
            self._epoch = epoch
        return int(self._permutation[offset])

    def _permutation_of(self, epoch: int) -> np.ndarray:
        words = [self._seed & 0xFFFFFFFF, self._seed >> 32 & 0xFFFFFFFF, epoch]
        return self._arrangement(np.random.RandomState(np.array(words, dtype=np.uint32)))


class MixedOrder:
    """An endless order over several groups of rows, each getting its share of every stretch of positions.

    Position p belongs to the group into whose part of [0, 1) frac(u + p * golden ratio) falls: the points of this
    sequence are spread evenly, so that shares hold within any few dozen positions. Within its group every position
    takes the next row of that group's own `EpochOrder`: a small group is repeated more often.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        weights: Sequence[float],
        arrange: Callable[[Sequence[int]], Arrangement],
        *,
        seed: int,
    ):
        """Mix groups of at least one row each; weights are positive and need not add up to 1.

        Args:
            groups: row numbers of each group.
            weights: share of each group, up to a common factor.
            arrange: function that returns the arrangement of some rows.
            seed: seed of the mixture and of every group's order.
        """
        self._groups = [np.asarray(group) for group in groups]
        self._orders = [EpochOrder(len(rows), arrange(rows), seed=seed + 1 + k) for k, rows in enumerate(groups)]
        self._upper_bounds = np.cumsum(weights) / np.sum(weights)
        words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
        self._start = np.random.RandomState(np.array(words, dtype=np.uint32)).random_sample()

    def rows(self, first: int, count: int) -> list[int]:
        """Row numbers at positions first, ..., first + count - 1; see `EpochOrder.rows`."""
        owners = self._owners(first + count)
        taken = np.bincount(owners[:first], minlength=len(self._groups)).tolist()
        rows = []
        for owner in owners[first:].tolist():
            rows.append(int(self._groups[owner][self._orders[owner].rows(taken[owner], 1)[0]]))
            taken[owner] += 1
        return rows

    def _owners(self, count: int) -> np.ndarray:
        """Index of the group of each of the first `count` positions, [count] int64."""
        points = np.mod(self._start + np.arange(count) * _GOLDEN_RATIO, 1.0)
        return np.minimum(np.searchsorted(self._upper_bounds, points, side="right"), len(self._groups) - 1)
