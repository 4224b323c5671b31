"""Which rows come when: a pure function of (seed, position), so resuming needs no state but the step."""

from __future__ import annotations

import numpy as np


class EpochOrder:
    """An endless order of `size` rows, epoch after epoch; each epoch visits every row once.

    An epoch's order is drawn from (seed, epoch). `RandomState` is used because NumPy promises never to change its
    streams (NEP 19), so an order outlives NumPy versions.
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool = True):
        """`size` is at least 1; without `shuffle` every epoch is in the order of the rows."""
        if size < 1:
            raise ValueError("cannot order an empty data set")
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._epoch = -1
        self._permutation = np.arange(size)

    def rows(self, first: int, count: int) -> list[int]:
        """Row numbers at positions first, ..., first + count - 1; a slice may go on into the next epoch.

        The same for the same arguments, whatever was asked before.
        """
        return [self._row(position) for position in range(first, first + count)]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self._size)
        if not self._shuffle:
            return offset
        if epoch != self._epoch:
            self._permutation = self._permutation_of(epoch)
            self._epoch = epoch
        return int(self._permutation[offset])

    def _permutation_of(self, epoch: int) -> np.ndarray:
        words = [self._seed & 0xFFFFFFFF, self._seed >> 32 & 0xFFFFFFFF, epoch]
        return np.random.RandomState(np.array(words, dtype=np.uint32)).permutation(self._size)
