"""Environments of TRL's `environment_factory`: a class with `reset`, tools as methods, and perhaps `get_reward`.

    begin: reset(**row) --> the prompt, with what it returned and with the tools in the chat template
    reply: tool calls of the turn, as TRL reads them --> results as messages of the role `tool`; none: over

The chat template must be one that TRL knows; TRL's training variant replaces one that rewrites earlier turns. Prompts
come as they are (data.apply_chat_template: false): the template is applied here, where the tools are known.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

from megatron_entropic.config.plugins import find_attribute
from megatron_entropic.data.tokenizer import Tokenizer
from megatron_entropic.environments.adapters.hosted import missing_package
from megatron_entropic.environments.text import ChatTurns
from megatron_entropic.errors import UserError
from megatron_entropic.types import Task

try:
    from trl import chat_template_utils as templates
except ImportError as error:
    raise missing_package("trl", error) from error


class TrlTools:
    """One conversation with an object that `environment`, `module:Class` or a function, makes."""

    gives_reward = True

    def __init__(self, tokenizer: Tokenizer, *, environment: str, system: str | None = None) -> None:
        """Make the environment, and take its public methods as tools; `system` is the system message."""
        _prepare(tokenizer)
        self._tokenizer, self._turns = tokenizer, ChatTurns(tokenizer)
        self._opening = [("system", system)] if system else []
        self._environment = find_attribute("environment.settings.environment", environment, arguments=0)()
        names = [name for name, _ in inspect.getmembers(type(self._environment), inspect.isfunction)]
        if "reset" not in names:
            raise UserError(f"{environment}: lacks reset(), which TRL asks of every environment")
        tools = [name for name in names if not name.startswith("_") and name not in ("reset", "get_reward")]
        self._tools = {name: getattr(self._environment, name) for name in tools}
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._read: list[int] = []

    def begin(self, task: Task) -> Sequence[int]:
        """The prompt with what `reset` returned; it gets the row as TRL gives it: prompt, ground_truth, extra_info."""
        row = {"prompt": task.text, "ground_truth": task.ground_truth, **task.extra_info}
        observation = self._environment.reset(**row)
        messages = [*self._opening, ("user", task.text + (observation or ""))]
        self._read = self._turns.opening(messages, tools=list(self._tools.values()))
        return self._read

    def reply(self, response: Sequence[int]) -> Sequence[int] | None:
        """The results of the turn's tool calls."""
        tools = list(self._tools.values())
        parsed = templates.parse_response(self._tokenizer, list(response), prefix=self._read, tools=tools)
        calls = [call["function"] for call in parsed.get("tool_calls") or []]
        if not calls:
            return None
        results = [("tool", str(self._result(call["name"], call["arguments"]))) for call in calls]
        said = self._turns.after_messages(response, results)
        self._read = [*self._read, *response, *said]
        return said

    def reward(self) -> float | None:
        """What `get_reward` says; without that method the verifier is asked."""
        own = getattr(self._environment, "get_reward", None)
        return None if own is None else self._awaited(own())

    def _result(self, name: str, arguments: dict[str, Any]) -> Any:
        try:
            return self._awaited(self._tools[name](**arguments)) if name in self._tools else f"There is no tool {name}."
        except Exception as error:  # noqa: BLE001  a tool's failure is the policy's to read, as in TRL
            return {"error": str(error)}

    def _awaited(self, value: Any) -> Any:
        if not inspect.iscoroutine(value):
            return value
        # One loop for all calls, as connections belong to the loop that they were opened in.
        self._event_loop = self._event_loop or asyncio.new_event_loop()
        return self._event_loop.run_until_complete(value)


def _prepare(tokenizer: Tokenizer) -> None:
    """Have the tokenizer read tool calls, once a process, and keep earlier turns as they are."""
    if getattr(tokenizer, "response_template", None) is not None:
        return
    try:
        templates.add_response_schema(tokenizer)
        if not templates.is_chat_template_prefix_preserving(tokenizer):
            tokenizer.chat_template = templates.get_training_chat_template(tokenizer)
    except ValueError as error:
        raise UserError(f"TRL cannot use tools with the tokenizer's chat template: {error}") from error
