"""What somebody writes who wants a model to learn in an environment: a class with three methods.

    begin(task) --> prompt --> policy's turn --> reply(turn) --> tokens --> policy's turn --> ... --> None --> reward()

Tokens in, tokens out: what the policy wrote is never made into text and into tokens again. There is one object for each
conversation. A method that waits for something may be `async def`; then others of the process go on meanwhile, and one
without is run in a thread of its own. `calculator.py` is an example to copy, `text.py` makes tokens of texts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_entropic.types import Task


@dataclass(frozen=True, slots=True)
class NewContext:
    """A reply after which the policy reads `tokens` alone, such as a summary or the task of a sub-agent."""

    tokens: Sequence[int]


Reply = Sequence[int] | NewContext | None


class Environment(Protocol):
    """The other side of one conversation, made by `Class(tokenizer, **environment.settings)`.

    A class that rewards every conversation itself may say `gives_reward = True`: no ground truth is then tried with the
    verifier before a run begins.
    """

    def begin(self, task: Task) -> Sequence[int] | Awaitable[Sequence[int]]:
        """Token ids that the policy reads first, such as `task.tokens`."""

    def reply(self, response: Sequence[int]) -> Reply | Awaitable[Reply]:
        """Token ids that follow the policy's turn `response`; None: the conversation is over."""

    def reward(self) -> float | Awaitable[float | None] | None:
        """Reward of the conversation at its end; None: `reward.verifier` judges what the policy wrote."""
