"""An environment whose answers nobody can foresee, for tests of runs that have to come again all the same."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from megatron_entropic.types import Task


class MoodyTool:
    """Says two random digits after each of the first two turns of a conversation, after a random time."""

    def __init__(self, tokenizer: Any, *, turns: int = 3) -> None:
        self._left = turns

    def begin(self, task: Task) -> Sequence[int]:
        return task.tokens.tolist()

    async def reply(self, response: Sequence[int]) -> Sequence[int] | None:
        self._left -= 1
        await asyncio.sleep(os.urandom(1)[0] / 25_600)
        return [byte % 10 for byte in os.urandom(2)] if self._left else None

    def reward(self) -> None:
        """The verifier judges what the policy wrote."""
