"""Environments that do what tools do on bad days, chosen by the task's ground truth."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any

from megatron_entropic.environments.base import NewContext
from megatron_entropic.types import Task


class Hostile:
    """Repeats the policy's turn with 1 added to each token, unless its task says otherwise."""

    gives_reward = True

    def __init__(self, tokenizer: Any, *, turns: int = 3) -> None:
        self._left = turns
        self._what = ""
        self._sum = 0

    def begin(self, task: Task) -> Sequence[int]:
        self._what = str(task.ground_truth)
        return [] if self._what == "begins with nothing" else task.tokens.tolist()

    async def reply(self, response: Sequence[int]) -> Sequence[int] | NewContext | None:
        self._left -= 1
        self._sum += sum(response)
        if self._what == "hangs":
            await asyncio.sleep(3600)
        if self._what == "hangs in a thread":
            return await asyncio.to_thread(time.sleep, 3600)  # type: ignore[func-returns-value]
        if self._what == "blocks the loop":
            time.sleep(3600)
        if self._what == "dies":
            os._exit(3)
        if self._what == "raises":
            raise ValueError("no such tool \udc80")
        if self._what == "raises a timeout of its own":
            raise TimeoutError("the tool's own")
        if self._what == "exits":
            raise SystemExit(0)
        odd: dict[str, Any] = {
            "10 MB": [5] * 5_000_000,
            "empty": [],
            "text": "result",
            "beyond the vocabulary": [10**6],
            "negative": [-1],
            "floats": [1.5],
            "nested": [[1]],
        }
        if self._what == "summarises":
            return NewContext([7, 8])
        if self._what == "summarises at length":
            return NewContext([7] * 60)
        if self._what in odd:
            return odd[self._what]  # type: ignore[no-any-return]
        return [token + 1 for token in response] if self._left else None

    def reward(self) -> float | None:
        if self._what == "no number":
            return float("nan")
        return None if self._what == "unjudged" else float(self._sum)


class Sync(Hostile):
    """The same, without asynchronous methods."""

    def reply(self, response: Sequence[int]) -> Sequence[int] | None:  # type: ignore[override]
        if self._what == "sleeps":
            time.sleep(3600)
        self._left -= 1
        self._sum += sum(response)
        return [token + 1 for token in response] if self._left else None


class Wants(Hostile):
    """Cannot do without a setting."""

    def __init__(self, tokenizer: Any, *, url: str) -> None:
        super().__init__(tokenizer)
        self.url = url


class NoReward:
    """Lacks a method."""

    def __init__(self, tokenizer: Any) -> None: ...

    def begin(self, task: Task) -> Sequence[int]:
        return task.tokens.tolist()

    def reply(self, response: Sequence[int]) -> None:
        return None
