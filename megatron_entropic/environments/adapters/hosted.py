"""A host that runs its own loop and calls a model in it, turned round: what it asks is what the policy reads next.

    host's loop --ask(messages)--> begin, reply --> tokens of the environment
    host's loop <-- text of the turn -- reply <-- tokens of the policy

Nothing that the policy wrote is made into tokens again: the host gets it as text, and only what is new comes back.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from megatron_entropic.data.tokenizer import Tokenizer
from megatron_entropic.environments.text import ChatTurns, Message
from megatron_entropic.errors import UserError


class HostLoop:
    """The loop of one conversation, a task of the running event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Speak with the policy in turns of the tokenizer's chat template."""
        self._tokenizer, self._turns = tokenizer, ChatTurns(tokenizer)
        self._asked: asyncio.Queue[list[Message]] = asyncio.Queue()
        self._turn: asyncio.Future[str] | None = None
        self._running: asyncio.Task[None] | None = None

    async def begin(self, loop: Coroutine[Any, Any, None]) -> Sequence[int]:
        """Run the host's loop, which calls `ask`; returns the tokens of what it asks first.

        Raises:
            RuntimeError: it ended without a question.
            Exception: whatever ended it.
        """
        self._running = asyncio.create_task(loop)
        if (messages := await self._next()) is None:
            raise RuntimeError("the episode was over before the policy was asked for anything")
        return self._turns.opening(messages)

    async def reply(self, response: Sequence[int]) -> Sequence[int] | None:
        """Hand a turn to the host; returns the tokens of what it asks next, None: its loop has ended.

        Raises:
            Exception: whatever ended it.
        """
        assert self._turn is not None, "the host has asked"
        self._turn.set_result(self._tokenizer.decode(response, skip_special_tokens=True))
        messages = await self._next()
        return None if messages is None else self._turns.after_messages(response, messages)

    async def ask(self, messages: list[Message]) -> str:
        """Text of the policy's next turn, for the host; `messages` are new since its last one."""
        self._turn = asyncio.get_running_loop().create_future()
        self._asked.put_nowait(messages)
        return await self._turn

    async def end(self, refusal: Exception) -> None:
        """Let the host's loop end, with `refusal` in place of a turn where it still waits for one."""
        if self._turn is not None and not self._turn.done():
            self._turn.set_exception(refusal)
        if self._running is not None:
            await self._running

    async def _next(self) -> list[Message] | None:
        assert self._running is not None, "the loop was begun"
        asked = asyncio.create_task(self._asked.get())
        try:
            await asyncio.wait({asked, self._running}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the time of the call has passed, and the conversation ends with it
            self._running.cancel()
            asked.cancel()
            raise
        if asked.done():
            return asked.result()
        asked.cancel()
        self._running.result()
        return None


class Numbered:
    """The items of an iterable by number, read as far as they are asked for; beyond the last one they begin anew."""

    def __init__(self, items: Iterable[Any]) -> None:
        """Read nothing yet."""
        self._remaining, self._found = iter(items), list[Any]()

    def __getitem__(self, number: int) -> Any:
        """Item `number`, counted from 0.

        Raises:
            UserError: there is not one item.
        """
        self._found.extend(itertools.islice(self._remaining, max(0, number + 1 - len(self._found))))
        if not self._found:
            raise UserError("there is not one task")
        return self._found[number % len(self._found)]


def missing_package(extra: str, error: ImportError) -> UserError:
    """The error for an adapter whose package is not there; `extra` is its name among ours."""
    return UserError(f"{error}: pip install 'megatron_entropic[{extra}]'; see docs/environment_adapters.md")
