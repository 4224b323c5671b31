"""Environments of the package verifiers: its own rollout runs, and the policy is its client.

    env.run(task, agents) --> harness --> interception server --> client --what is new--> policy's prompt or reply
    trace's assistant message <-- response <-- text of the policy's turn

All is verifiers' own but the harness, one request in this process where theirs are programs in sandboxes: what needs a
program, as tool servers do, verifiers itself refuses.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_entropic.data.tokenizer import Tokenizer
from megatron_entropic.environments.adapters.hosted import HostLoop, Numbered, missing_package
from megatron_entropic.types import Task

try:
    import httpx
    import verifiers.v1 as vf
    from verifiers.v1.dialects.chat import message_to_wire
    from verifiers.v1.interception import InterceptionServer
    from verifiers.v1.types import content_text
except ImportError as error:
    raise missing_package("verifiers", error) from error

_ENDPOINT = vf.EvalClientConfig(base_url="http://127.0.0.1", api_key_var="NONE")


class Verifiers(vf.Client):
    """One episode; row n of the data is task n of the taskset, or the one that its `extra_info.task` says."""

    gives_reward = True

    def __init__(self, tokenizer: Tokenizer, *, environment: Mapping[str, Any]) -> None:
        """Take the environment that `environment` describes, as the section `env` of verifiers does."""
        self._loop = HostLoop(tokenizer)
        self._environment, self._tasks = _loaded(json.dumps(environment, sort_keys=True))

    async def begin(self, task: Task) -> Sequence[int]:
        """The messages that open the episode."""
        return await self._loop.begin(self._run(self._tasks[task.extra_info.get("task", task.index)]))

    async def reply(self, response: Sequence[int]) -> Sequence[int] | None:
        """The messages that follow in the episode."""
        return await self._loop.reply(response)

    async def reward(self) -> float:
        """Reward of the policy's trace; an episode that met a limit of ours is scored as far as it came."""
        self._trace.stop("limit")  # without effect on one that has ended by itself
        await self._loop.end(vf.HarnessError("no turn can follow"))
        if self._trace.last_error is not None:
            raise RuntimeError(f"verifiers: {self._trace.last_error.type}: {self._trace.last_error.message}")
        return float(self._trace.reward)

    async def get_response(self, dialect: Any, body: Any, *_: Any, turn: Any = None, **__: Any) -> Any:
        """The policy's turn as verifiers gets it."""
        self._trace = turn.trace
        text = await self._loop.ask([(message.role, content_text(message.content)) for message in turn.tail])
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        raw = {"id": "policy", "object": "chat.completion", "created": 0, "model": "policy", "choices": [choice]}
        return dialect.parse_response(dialect.validate_response(raw)).model_copy(update={"raw": raw})

    async def _run(self, task: Any) -> None:
        def seat(name: str, spec: Any) -> Any:
            update = {"model": "policy", "client": _ENDPOINT, "runtime": vf.SubprocessConfig()}
            agent = vf.Agent(spec.model_copy(update=update), interception=server)
            agent.harness = _OneRequest(vf.HarnessConfig(id="null"))
            return agent

        async with InterceptionServer() as server:
            server.clients[_ENDPOINT.model_dump_json()] = self
            agents = vf.Agents(self._environment.config, seat)
            await self._environment.setup(agents)
            await self._environment.run(task, agents)


class _OneRequest(vf.Harness):
    APPENDS_SYSTEM_PROMPT = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, _: Any, data: Any) -> Any:
        prompt = [vf.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else list(data.prompt or [])
        system = [vf.SystemMessage(content=data.system_prompt)] if data.system_prompt else []
        body = {"model": ctx.model, "messages": [message_to_wire(message) for message in system + prompt]}
        headers = {"Authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(timeout=None, trust_env=False, headers=headers) as http:
            reply = await http.post(f"{endpoint}/chat/completions", json=body)
        return vf.ProgramResult(int(reply.is_error), "", reply.text)


@functools.cache
def _loaded(settings: str) -> tuple[Any, Numbered]:
    """The environment that all episodes of the process share, and its tasks by number."""
    environment = vf.load_environment(vf.resolve_env_config(json.loads(settings)))
    return environment, Numbered(environment.taskset)
