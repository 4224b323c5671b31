"""Means over all tokens of a rollout, a part of them at a time: no copy of all of them is ever made.

    log-probs of each response, [R] --parts_of--> [PART_TOKENS or a little more] --float64--> Sums --> mean, highest

The sums of parts are added exactly (`math.fsum`). A rollout of one part has the bits of `torch.mean` over all tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

PART_TOKENS = 1 << 18
"""Tokens of a part: 2 MB in float64, so that what is computed from it stays in a processor's cache."""


def parts_of(sequences: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Yields columns of whole sequences one after the other, each part with PART_TOKENS tokens or a little more.

    Args:
        sequences: the columns of each sequence, [R] each.
    """
    taken: list[tuple[Tensor, ...]] = []
    tokens = 0
    for columns in sequences:
        taken.append(columns)
        tokens += columns[0].numel()
        if tokens >= PART_TOKENS:
            yield tuple(map(torch.cat, zip(*taken, strict=True)))
            taken, tokens = [], 0
    if tokens:
        yield tuple(map(torch.cat, zip(*taken, strict=True)))


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

    @property
    def names(self) -> list[str]:
        """Names of what has values, in the order in which they came."""
        return [name for name, count in self._counts.items() if count]

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
