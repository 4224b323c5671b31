"""Problems that come twice, and training problems that are also in a benchmark.

Two problems are equal if their texts are after normalisation: Unicode NFKC, lower case, white space as one space. They
overlap if they share n words in a row; words that more than ten training problems share are boilerplate, which does not
count.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_WORD = re.compile(r"\w+")
_COMMON_ROWS = 10


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Positions of problems that an earlier one equals."""

    positions: list[int]
    contradictions: list[int]
    """Those whose ground truth is not that of the earlier one."""


@dataclass(slots=True)
class Overlap:
    """Positions of training problems that a benchmark has too."""

    exact: list[int] = field(default_factory=list)
    ngram: list[int] = field(default_factory=list)
    """Not among the equal ones."""

    @property
    def positions(self) -> set[int]:
        """All of them."""
        return {*self.exact, *self.ngram}


def normalised(text: str) -> str:
    """What two problems that count as equal have in common."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def find_duplicates(texts: Sequence[str], truths: Sequence[Any]) -> Duplicates:
    """Later copies of earlier problems."""
    first: dict[str, int] = {}
    found = Duplicates([], [])
    for position, text in enumerate(texts):
        earlier = first.setdefault(normalised(text), position)
        if earlier != position:
            found.positions.append(position)
            if str(truths[position]).strip() != str(truths[earlier]).strip():
                found.contradictions.append(position)
    return found


def find_overlap(texts: Sequence[str], benchmarks: Mapping[str, Sequence[str]], words: int) -> dict[str, Overlap]:
    """The training problems that each benchmark has too.

    Args:
        texts: training problems.
        benchmarks: problems of each benchmark.
        words: n of the n-grams. Shorter problems can only be equal.
    """
    equal = {name: {normalised(problem) for problem in problems} for name, problems in benchmarks.items()}
    grams = {
        name: set().union(*(ngrams(problem, words) for problem in problems)) for name, problems in benchmarks.items()
    }
    wanted = set().union(*grams.values())
    shared = [ngrams(text, words) & wanted for text in texts]
    counts = Counter(gram for row in shared for gram in row)
    telling = {gram for gram, count in counts.items() if count <= _COMMON_ROWS}
    found = {name: Overlap() for name in benchmarks}
    for position, text in enumerate(texts):
        plain = normalised(text)
        for name, overlap in found.items():
            if plain in equal[name]:
                overlap.exact.append(position)
            elif not telling.isdisjoint(shared[position] & grams[name]):
                overlap.ngram.append(position)
    return found


def ngrams(text: str, words: int) -> set[int]:
    """Hashes of every `words` words in a row; equal within one process only."""
    found = _WORD.findall(normalised(text))
    return {hash(tuple(found[start : start + words])) for start in range(len(found) - words + 1)}
