"""Checks of conversations with an environment, in training and in benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_entropic.config.base import Violation
from megatron_entropic.config.data import EnvironmentConfig
from megatron_entropic.config.names import ENVIRONMENTS, unknown_name
from megatron_entropic.config.run import Config


def environment_violations(config: Config) -> Iterator[Violation]:
    """Yields environments that do not exist, and limits that cannot be reached or have no use."""
    environment, longest = config.environment, config.rollout.max_response_tokens
    if environment.name is None:
        before, now = EnvironmentConfig().model_dump(), environment.model_dump()
        if used := ", ".join(f"environment.{key}" for key in now if now[key] != before[key]):
            yield Violation(("environment.name",), f"{used} has no use without environment.name")
        return
    if problem := unknown_name(environment.name, ENVIRONMENTS, own="module:Class"):
        yield Violation(("environment.name",), f"environment.name={environment.name!r}: {problem}")
    if (environment.max_turn_tokens or 0) > longest:
        yield Violation(
            ("environment.max_turn_tokens", "rollout.max_response_tokens"),
            f"environment.max_turn_tokens={environment.max_turn_tokens} is more than rollout.max_response_tokens="
            f"{longest}, which counts all turns and what the environment writes between them",
        )
