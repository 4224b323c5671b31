"""Environments of OpenEnv: a session of a server, which the policy's turns step.

    begin: reset(seed=row, ...) --> observation --> user's message
    reply: the turn as JSON, or as the only field that the server's action has --> step --> observation, reward, done

The reward of a conversation is the sum of those of its steps. The server is somebody's to start; one session a
conversation, so it must allow as many (`max_concurrent_envs`) as run at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_entropic.data.tokenizer import Tokenizer
from megatron_entropic.environments.adapters.hosted import missing_package
from megatron_entropic.environments.text import ChatTurns
from megatron_entropic.types import Task

try:
    import httpx
    from openenv import GenericEnvClient
except ImportError as error:
    raise missing_package("openenv", error) from error

_OWN_FIELDS = ("metadata", "done", "reward")
"""Fields of every observation that are not for the policy."""


class OpenEnv:
    """One session of the server at `url`."""

    gives_reward = True

    def __init__(self, tokenizer: Tokenizer, *, url: str, observation: str | None = None) -> None:
        """Show the policy the field `observation` of what the server says; None: all fields, as JSON."""
        self._tokenizer, self._turns = tokenizer, ChatTurns(tokenizer)
        self._url, self._shown = url, observation
        self._action: dict[str, Any] = {}
        self._reward = 0.0

    async def begin(self, task: Task) -> Sequence[int]:
        """The text of the task and the first observation; `extra_info.reset` of the task goes to the server's reset."""
        async with httpx.AsyncClient(base_url=self._url, trust_env=False) as http:
            self._action = (await http.get("/schema")).raise_for_status().json()["action"]
        self._client = GenericEnvClient(base_url=self._url)
        result = await self._asked(self._client.reset(**{"seed": task.index, **task.extra_info.get("reset", {})}))
        return self._turns.opening([("user", f"{task.text}\n\n{self._text(result.observation)}".strip())])

    async def reply(self, response: Sequence[int]) -> Sequence[int] | None:
        """The next observation; what is wrong with a turn that is no action."""
        action = self._parsed(self._tokenizer.decode(response, skip_special_tokens=True).strip())
        if isinstance(action, str):
            return self._turns.after(response, "user", action)
        try:
            result = await self._asked(self._client.step(action))
        except RuntimeError as error:  # what the server answers, the code of the failure in its words
            if "VALIDATION_ERROR" not in str(error):
                raise
            return self._turns.after(response, "user", f"That is no valid action: {error}")
        self._reward += result.reward or 0.0
        return None if result.done else self._turns.after(response, "user", self._text(result.observation))

    async def reward(self) -> float:
        """Sum of the rewards of all steps."""
        await self._client.close()
        return self._reward

    async def _asked(self, answer: Any) -> Any:
        try:
            return await answer
        except BaseException:  # the conversation ends with it, and the server's session must too
            await self._client.close()
            raise

    def _parsed(self, text: str) -> dict[str, Any] | str:
        """The action that a turn means, or words for why it means none."""
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        fields = self._action.get("properties", {})
        required = self._action.get("required", [])
        if isinstance(value, dict):
            wrong = [name for name in value if name not in fields] + [name for name in required if name not in value]
            return f"An action has the fields {', '.join(required)}, not: {', '.join(wrong)}" if wrong else value
        if len(required) == 1:
            return {required[0]: text if fields[required[0]].get("type") == "string" else value}
        return f"An action is a JSON object with the fields {', '.join(required)}."

    def _text(self, observation: dict[str, Any]) -> str:
        if self._shown is not None:
            return str(observation[self._shown])
        shown = {name: value for name, value in observation.items() if name not in _OWN_FIELDS}
        return json.dumps(shown, ensure_ascii=False)
