"""A calculator as a tool: the policy writes lines, the lines that ask for a value get one.

    prompt      Question: 12 + 45 * 3 =\\n
    policy      calc: 45 * 3\\n           <- a turn ends with its line: rollout.stop: ["\\n"]
    calculator  135\\n
    policy      answer: 147\\n            <- over; reward 1 if it is task.ground_truth

The class to copy for a tool of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_entropic.data.tokenizer import Tokenizer
from megatron_entropic.environments.text import plain_tokens
from megatron_entropic.rewards.verifiers.countdown import expression_value
from megatron_entropic.types import Task


class Calculator:
    """One conversation with a calculator that knows whole numbers, + - * and no brackets."""

    gives_reward = True

    def __init__(self, tokenizer: Tokenizer, *, call: str = "calc:", answer: str = "answer:") -> None:
        """Read lines that begin with `call` as questions, and one that begins with `answer` as the end."""
        self._tokenizer = tokenizer
        self._call, self._answer = call, answer
        self._truth = ""
        self._said: str | None = None

    def begin(self, task: Task) -> Sequence[int]:
        """The prompt as it is."""
        self._truth = str(task.ground_truth)
        return task.tokens.tolist()

    def reply(self, response: Sequence[int]) -> Sequence[int] | None:
        """The value of what the last line of a turn asks for; words where it asks for nothing."""
        text: str = self._tokenizer.decode(response, skip_special_tokens=True)
        lines = text.strip().splitlines()
        line = lines[-1].strip() if lines else ""
        if line.startswith(self._answer):
            self._said = line.removeprefix(self._answer)
            return None
        value = expression_value(line.removeprefix(self._call)) if line.startswith(self._call) else None
        said = "cannot be calculated" if value is None else str(value)
        return plain_tokens(self._tokenizer, f"{said}\n" if text.endswith("\n") else f"\n{said}\n")

    def reward(self) -> float:
        """1 for the right answer."""
        said = None if self._said is None else expression_value(self._said.replace("-", "0-", 1))
        return float(said is not None and said == expression_value(self._truth.replace("-", "0-", 1)))
