"""A process of environments: `python -m megatron_entropic.environments.worker ENVIRONMENT HF_DIR`.

ENVIRONMENT is the section `environment` of the configuration as JSON. Calls come in as pickles on standard input, their
answers go out as JSON lines on what was standard output, in the order in which they are there.

All conversations of the process share one event loop. A method that is not asynchronous runs in a thread of its own:
one that hangs holds up nobody, and the process says with each answer how many such threads it has. The process ends
when its input does.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import math
import os
import pickle
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_entropic.config.data import EnvironmentConfig
from megatron_entropic.config.names import environment_target
from megatron_entropic.config.plugins import find_attribute
from megatron_entropic.data.tokenizer import Tokenizer, embedding_rows, load_tokenizer
from megatron_entropic.environments.base import NewContext
from megatron_entropic.environments.conversation import Answer, Call
from megatron_entropic.errors import UserError

_LONGEST_MESSAGE = 500


class _Late(Exception):
    """A method has passed its time."""


@dataclass(slots=True)
class _Live:
    """One conversation with its object."""

    environment: Any
    answered: int = 0
    """Number of turns that it has answered."""


@dataclass
class Conversations:
    """The conversations of one process."""

    make: Callable[[], Any]
    reply_timeout_s: float
    vocabulary: int
    """Number of token ids that the model knows."""
    stuck: int = 0
    """Number of threads that have passed their time."""
    _live: dict[tuple[str, int], _Live] = field(default_factory=dict)

    async def answer(self, call: Call) -> Answer:
        """Answer a call; nothing that an environment does is raised."""
        began_s, key = time.monotonic(), (call.key.group, call.key.sample)
        try:
            answer = await self._answer(key, call)
        except _Late:
            answer = Answer(None, "timeout", message=f"no answer within {self.reply_timeout_s:g} s")
        except (Exception, SystemExit) as error:  # noqa: BLE001  foreign code: its failure is an event to count
            answer = Answer(None, "error", message=f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE])
        if answer.tokens is None:
            self._live.pop(key, None)
        return replace(answer, seconds=time.monotonic() - began_s)

    async def _answer(self, key: tuple[str, int], call: Call) -> Answer:
        if not call.turns:
            self._live[key] = live = _Live(self.make())
            began = self._tokens(await self._within_time(live.environment.begin, call.task), "begin")
            return Answer(_fitting(began, call, "begin"))
        live, differences = await self._at(key, call)
        replied = await self._within_time(live.environment.reply, call.turns[-1].tolist())
        live.answered += 1
        if replied is not None:
            tokens, new_context = self._replied(replied)
            if not call.ends and new_context:
                return Answer(_fitting(tokens, call, "reply"), new_context=True, differences=differences)
            if not call.last and tokens.size <= call.room:
                return Answer(tokens, differences=differences)
        reward = await self._within_time(live.environment.reward)
        ending = "over" if replied is None else call.last or "length"
        return Answer(None, ending, reward=_number(reward), differences=differences)

    async def _at(self, key: tuple[str, int], call: Call) -> tuple[_Live, int]:
        """The object that has answered all turns but the last, made anew where it is not here.

        Returns:
            (it, how often it now said something else than what the policy has read).
        """
        live = self._live.get(key)
        if live is not None and live.answered == len(call.turns) - 1:
            return live, 0
        self._live[key] = live = _Live(self.make())
        said = [self._tokens(await self._within_time(live.environment.begin, call.task), "begin")]
        for turn in call.turns[:-1]:
            replied = await self._within_time(live.environment.reply, turn.tolist())
            said.append(np.empty(0, np.int32) if replied is None else self._replied(replied)[0])
            live.answered += 1
        return live, sum(not np.array_equal(*pair) for pair in zip(said, call.answers, strict=True))

    async def _within_time(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Result of a method of an environment, asynchronous or not.

        Raises:
            _Late: it takes longer than `reply_timeout_s`.
        """
        if inspect.iscoroutinefunction(method):
            return await self._awaited(method(*arguments))
        done: Future[Any] = Future()
        threading.Thread(target=_run, args=(done, functools.partial(method, *arguments)), daemon=True).start()
        waiting = asyncio.wrap_future(done)
        ready, _ = await asyncio.wait([waiting], timeout=self.reply_timeout_s)
        if not ready:
            self.stuck += 1
            done.add_done_callback(self._came_back)
            raise _Late
        found = waiting.result()
        # A method may return an awaitable without being declared so.
        return await self._awaited(found) if inspect.isawaitable(found) else found

    async def _awaited(self, waiting: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(self.reply_timeout_s) as limit:
                return await waiting
        except TimeoutError:  # an environment can raise it too
            if limit.expired():
                raise _Late from None
            raise

    def _came_back(self, done: Future[Any]) -> None:
        self.stuck -= 1

    def _replied(self, replied: Any) -> tuple[np.ndarray, bool]:
        """Tokens of a reply, and whether they replace the context."""
        new = isinstance(replied, NewContext)
        return self._tokens(replied.tokens if new else replied, "reply"), new

    def _tokens(self, given: Any, method: str) -> np.ndarray:
        """What `begin` or `reply` returned, [n] int32.

        Raises:
            UserError: it is no list of token ids of the model, or it is empty.
        """
        tokens = np.asarray(given)
        if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            hint = "; None ends the conversation" if method == "reply" else ""
            raise UserError(f"{method}() returned {_short(given)}, which is no list of token ids{hint}")
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            wrong = tokens[(tokens < 0) | (tokens >= self.vocabulary)][0]
            raise UserError(f"{method}() returned the token {wrong}, but the model knows 0 to {self.vocabulary - 1}")
        return tokens.astype(np.int32)


def _fitting(prompt: np.ndarray, call: Call, method: str) -> np.ndarray:
    """A prompt that the engine can take.

    Raises:
        UserError: it is longer than `data.max_prompt_tokens`.
    """
    if prompt.size > call.prompt_room:
        raise UserError(
            f"{method}() returned a prompt of {prompt.size} tokens, data.max_prompt_tokens={call.prompt_room}"
        )
    return prompt


def _run(done: Future[Any], method: Callable[[], Any]) -> None:
    try:
        done.set_result(method())
    except BaseException as error:  # noqa: BLE001  whoever waits gets it
        done.set_exception(error)


def _number(reward: Any) -> float | None:
    if reward is None:
        return None
    value = float(reward)
    if not math.isfinite(value):
        raise UserError(f"reward() returned {value}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


async def _serve(conversations: Conversations, answers: IO[str]) -> None:
    """Answer calls until the input ends."""
    loop, running = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    calls: asyncio.Queue[tuple[int, Call] | None] = asyncio.Queue()

    def read() -> None:
        while True:
            try:
                numbered = pickle.load(sys.stdin.buffer)
            except EOFError:
                loop.call_soon_threadsafe(calls.put_nowait, None)
                return
            loop.call_soon_threadsafe(calls.put_nowait, numbered)

    async def answer(number: int, call: Call) -> None:
        found = await conversations.answer(call)
        _write(answers, {"number": number, **found.row(), "stuck": conversations.stuck})

    threading.Thread(target=read, daemon=True).start()
    while (numbered := await calls.get()) is not None:
        task = asyncio.create_task(answer(*numbered))
        running.add(task)
        task.add_done_callback(running.discard)


def _write(answers: IO[str], value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def environment_maker(config: EnvironmentConfig, tokenizer: Tokenizer) -> functools.partial[Any]:
    """Function that makes the environment of one conversation.

    Raises:
        UserError: there is no such class, it cannot be made with these settings, or it lacks a method.
    """
    assert config.name is not None, "there is an environment"
    made = find_attribute("environment", environment_target(config.name), arguments=None)
    make = functools.partial(made, tokenizer, **config.settings)
    try:
        one = make()
    except (Exception, SystemExit) as error:  # whatever somebody's own class raises is theirs to mend
        raise UserError(
            f"environment={config.name}: cannot be made with environment.settings={config.settings}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if missing := [name for name in ("begin", "reply", "reward") if not callable(getattr(one, name, None))]:
        raise UserError(f"environment={config.name}: lacks {', '.join(missing)}; see environments/base.py")
    return make


def main() -> None:
    """Serve conversations until the input ends."""
    config, hf_dir = EnvironmentConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # An environment that prints must not speak into the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        tokenizer = load_tokenizer(hf_dir)
        make = environment_maker(config, tokenizer)
    except UserError as error:
        _write(answers, {"failed": str(error)})
        return
    gives_reward = bool(getattr(make.func, "gives_reward", False))
    _write(answers, {"ready": os.getpid(), "gives_reward": gives_reward})
    vocabulary = embedding_rows(tokenizer) or len(tokenizer)
    asyncio.run(_serve(Conversations(make, config.reply_timeout_s, vocabulary), answers))
    # Threads that hang do not keep a daemon's process, but whatever they started might hold its end up.
    os._exit(0)


if __name__ == "__main__":
    main()
