"""A guessing game: the policy says numbers, the game says whether the one it thinks of is higher or lower.

    prompt   Guess a number from 1 to 20.\\n
    policy   10\\n                        <- a turn ends with its line: rollout.stop: ["\\n"]
    game     higher\\n
    policy   15\\n                        <- right: over; reward 1, less `cost` for each guess before

Halving the range finds any of n numbers in log2(n) turns; a model that does not listen needs n / 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_entropic.data.tokenizer import Tokenizer
from megatron_entropic.environments.text import plain_tokens
from megatron_entropic.types import Task

_NUMBER = re.compile(r"-?[0-9]{1,9}")


class Guess:
    """One game; the number is the ground truth of the task."""

    gives_reward = True

    def __init__(
        self, tokenizer: Tokenizer, *, higher: str = "higher\n", lower: str = "lower\n", cost: float = 0.1
    ) -> None:
        """Say `higher` or `lower` after a guess; each wrong one costs `cost` of the reward."""
        self._tokenizer = tokenizer
        self._higher, self._lower, self._cost = higher, lower, cost
        self._number = self._wrong = 0
        self._found = False

    def begin(self, task: Task) -> Sequence[int]:
        """The prompt as it is."""
        self._number = int(task.ground_truth)
        return task.tokens.tolist()

    def reply(self, response: Sequence[int]) -> Sequence[int] | None:
        """Where the number is, seen from the first number of the turn; a turn without one ends the game."""
        text: str = self._tokenizer.decode(response, skip_special_tokens=True)
        found = _NUMBER.search(text)
        if found is None:
            return None
        guess = int(found.group())
        if guess == self._number:
            self._found = True
            return None
        self._wrong += 1
        said = self._higher if self._number > guess else self._lower
        # A turn that was cut off at its limit lacks the end of its line.
        opens_line = said.endswith("\n") and not text.endswith("\n")
        return plain_tokens(self._tokenizer, f"\n{said}" if opens_line else said)

    def reward(self) -> float:
        """1 less the cost of wrong guesses, at least 0; 0 for a number that was not found."""
        return max(0.0, 1.0 - self._cost * self._wrong) if self._found else 0.0
