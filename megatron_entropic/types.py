"""The plain dataclasses that cross room borders. Shapes: L tokens of a sequence, R of them in the response."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch


@dataclass(slots=True)
class Prompt:
    """One problem as the data set gives it."""

    index: int
    """Row in the data set: stable over epochs and restarts."""
    tokens: list[int]
    text: str
    ground_truth: Any
    data_source: str = ""
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class GenerationRequest:
    """One response that an engine shall sample."""

    prompt: Prompt
    sample_index: int
    """Which of the responses to this prompt."""
    seed: int
    """Of this response alone, so that it depends neither on its neighbours in the batch nor on restarts."""


@dataclass(slots=True)
class Sample:
    """One response of an engine to one prompt."""

    prompt: Prompt
    sample_index: int
    response_tokens: list[int]
    """Includes the end-of-sequence token when the engine stopped at it."""
    rollout_logprobs: list[float]
    """[R] log pi_engine(token) at the rollout temperature, float32."""
    finish_reason: str
    """stop, length or abort, as vLLM says it."""
    weights_version: int
    text: str = ""
    reward: float | None = None
    verifier_status: str = ""
    """ok, timeout or error: a verifier that failed is not a wrong answer."""
    verifier_reward: float = 0.0
    """The verifier's own part of the reward; 0 where it failed."""

    @property
    def correct(self) -> bool:
        """Whether the verifier gave a positive reward; added rewards do not count."""
        return self.verifier_reward > 0


@dataclass(slots=True)
class Sequence:
    """What the policy scores and trains on: one prompt with one response."""

    tokens: torch.Tensor
    """[L] int64, prompt followed by response."""
    prompt_length: int
    advantages: torch.Tensor | None = None
    """[R] float32."""
    old_logprobs: torch.Tensor | None = None
    """[R] float32, of the policy that is about to be updated (score pass)."""
    rollout_logprobs: torch.Tensor | None = None
    """[R] float32, as the engine reported them."""
    reference_logprobs: torch.Tensor | None = None
    """[R] float32, of the frozen reference; None without a KL penalty."""
    experts: torch.Tensor | None = None
    """[L, layers with experts, k] uint8 or int16, as the score pass routed; None without router replay."""

    @property
    def response_length(self) -> int:
        """R, the number of tokens after the prompt."""
        return self.tokens.numel() - self.prompt_length

    def __getstate__(self) -> list[Any]:
        """Between processes as arrays: pickling a small tensor takes a hundred times as long."""
        return [_as_array(getattr(self, item.name)) for item in fields(self)]

    def __setstate__(self, state: list[Any]) -> None:
        for item, value in zip(fields(self), state, strict=True):
            setattr(self, item.name, _as_tensor(value))


@dataclass(slots=True)
class Scores:
    """Per-token statistics of some sequences, in the caller's order."""

    logprobs: list[torch.Tensor]
    """Each [R] float32, at the temperature asked for."""
    entropies: list[torch.Tensor]
    """Each [R] float32, nats, of the full softmax at the same temperature."""
    experts: list[torch.Tensor] = field(default_factory=list)
    """As `Sequence.experts`; empty without router replay."""

    def __getstate__(self) -> list[Any]:
        """As `Sequence`."""
        return [[_as_array(value) for value in getattr(self, item.name)] for item in fields(self)]

    def __setstate__(self, state: list[Any]) -> None:
        for item, values in zip(fields(self), state, strict=True):
            setattr(self, item.name, [_as_tensor(value) for value in values])


def _as_array(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value


def _as_tensor(value: Any) -> Any:
    # A copy: arrays that come through shared memory are read-only.
    return torch.tensor(value) if isinstance(value, np.ndarray) else value
