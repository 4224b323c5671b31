"""Means over all tokens of a rollout, a part of them at a time: no copy of all of them is ever made.

    log-probs of each response, [R] --> parts of PART_TOKENS or a little more --float64--> Sums --> mean, highest

Threads take the parts in turn, one for each core. The sums of parts are added exactly (`math.fsum`), so that nothing
depends on the threads, and a rollout of one part has the bits of `torch.mean` over all tokens.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

PART_TOKENS = 1 << 16
"""Tokens of a part: 0.5 MB in float64, so that what is computed from it stays in a processor's cache."""
_MOST_THREADS = 32


class Sums:
    """Sums, numbers and highest of values, by name."""

    def __init__(self) -> None:
        self._totals: dict[str, list[float]] = defaultdict(list)
        self._counts: dict[str, int] = defaultdict(int)
        self._highest: dict[str, float] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Take values of a part, [n] float64."""
        self._totals[name].append(float(values.sum()))
        self._counts[name] += values.numel()

    def add_highest(self, name: str, values: Tensor) -> None:
        """Take the highest of a part's values, [n], n > 0."""
        self._highest[name] = max(float(values.max()), self._highest.get(name, -math.inf))

    def merge(self, other: Sums) -> None:
        """Take what another one has taken."""
        for name, totals in other._totals.items():
            self._totals[name] += totals
            self._counts[name] += other._counts[name]
        for name, highest in other._highest.items():
            self._highest[name] = max(highest, self._highest.get(name, -math.inf))

    def count(self, name: str) -> int:
        """Number of values."""
        return self._counts[name]

    def total(self, name: str) -> float:
        """Sum of the values."""
        return math.fsum(self._totals[name])

    def mean(self, name: str, *, empty: float = math.nan) -> float:
        """Mean of the values; `empty` if there are none."""
        return self.total(name) / self._counts[name] if self._counts[name] else empty

    def highest(self, name: str, *, empty: float = math.nan) -> float:
        """Highest of what `add_highest` took; `empty` if it took nothing."""
        return self._highest.get(name, empty)


def summed(sequences: Iterable[tuple[Tensor, ...]], measure: Callable[..., None]) -> Sums:
    """Sums over the tokens of all sequences.

    Args:
        sequences: columns of each sequence, [R] each.
        measure: function (sums, columns ...) that adds what it makes of a part's columns to the part's sums; called in
            several threads.
    """

    def of_part(part: list[tuple[Tensor, ...]]) -> Sums:
        sums = Sums()
        measure(sums, *map(torch.cat, zip(*part, strict=True)))
        return sums

    whole, parts = Sums(), list(_parts(sequences))
    if len(parts) < 2:
        found = [of_part(part) for part in parts]
    else:
        with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MOST_THREADS, len(parts))) as threads:
            found = list(threads.map(of_part, parts))
    for sums in found:
        whole.merge(sums)
    return whole


def _parts(sequences: Iterable[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yields whole sequences one after the other, each part with PART_TOKENS tokens or a little more."""
    taken: list[tuple[Tensor, ...]] = []
    tokens = 0
    for columns in sequences:
        taken.append(columns)
        tokens += columns[0].numel()
        if tokens >= PART_TOKENS:
            yield taken
            taken, tokens = [], 0
    if tokens:
        yield taken
