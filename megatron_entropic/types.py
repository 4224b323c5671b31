"""The plain types that cross room borders, each filled in by one room and changed by none.

    Task ---------> GenerationRequest --> Response --> Trajectory ----> Group ---------> TrainingBatch
    data            driver                engine       driver: text     verifiers:       driver: advantages,
                    no ground truth       one segment  of segments      rewards          then scores

Shapes: P tokens of a prompt, L tokens of a sequence, R of them after the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # a verifier's process needs no torch, which takes seconds to import
    import torch

Tokens = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One problem as the data set gives it. Its ground truth stays with the driver."""

    index: int
    """Row in the data set: stable over epochs and restarts."""
    tokens: Tokens
    """[P] int32, the prompt as the model reads it."""
    text: str
    """The prompt as text, with template."""
    ground_truth: Any
    data_source: str = ""
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """One continuation that an engine shall sample."""

    tokens: Tokens
    """[P] int32, what it continues."""
    seed: int
    """Of this response alone, so that it depends neither on its neighbours in the batch nor on restarts."""


class Origin(Enum):
    """Who wrote the tokens of a segment."""

    POLICY = "policy"
    ENVIRONMENT = "environment"


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive tokens after a prompt that were written by one side, and sampled from one version of the weights."""

    tokens: Tokens
    """[n] int32; includes the end-of-sequence token when the engine stopped at it."""
    logprobs: Logprobs
    """[n] float32, log pi_engine(token) at the rollout temperature; [0] where the environment wrote the tokens."""
    weights_version: int
    """Of the engine that sampled it; -1 where the environment wrote the tokens."""
    origin: Origin = Origin.POLICY

    def copied(self) -> Segment:
        """The same with arrays of its own: those that came through shared memory keep it occupied."""
        return replace(self, tokens=self.tokens.copy(), logprobs=self.logprobs.copy())


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """What an engine answers to a request."""

    segment: Segment
    finish_reason: str
    """stop, length or abort, as vLLM says it."""


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One attempt at a task: all that was written after its prompt, by the policy and by the environment."""

    task: Task
    sample_index: int
    """Which of the attempts at this task."""
    segments: tuple[Segment, ...]
    finish_reason: str
    """Of the last segment that the policy wrote."""
    text: str
    """Of what the policy wrote, without special tokens."""

    @property
    def response_tokens(self) -> Tokens:
        """[R] int32, the tokens of all segments."""
        return _joined([segment.tokens for segment in self.segments], np.int32)

    @property
    def rollout_logprobs(self) -> Logprobs:
        """[number of tokens that the policy wrote] float32, log pi_engine(token) at the rollout temperature."""
        return _joined([s.logprobs for s in self.segments if s.origin is Origin.POLICY], np.float32)

    @property
    def response_length(self) -> int:
        """R, the number of tokens after the prompt."""
        return sum(segment.tokens.size for segment in self.segments)

    @property
    def weights_version(self) -> int:
        """The oldest version of the weights that wrote a part of it."""
        return min(segment.weights_version for segment in self.segments if segment.origin is Origin.POLICY)


@dataclass(frozen=True, slots=True)
class Reward:
    """What became of the verdicts on one trajectory."""

    value: float
    """What the policy is trained on: the verifier's reward, added rewards and punishments."""
    verifier: float
    """The verifier's own part; 0 where it failed."""
    status: str
    """ok, timeout or error: a verifier that failed is not a wrong answer."""

    @property
    def correct(self) -> bool:
        """Whether the verifier gave a positive reward; added rewards do not count."""
        return self.verifier > 0


@dataclass(frozen=True, slots=True)
class Group:
    """The trajectories of one task with their rewards, of which advantages are computed."""

    trajectories: tuple[Trajectory, ...]
    rewards: tuple[Reward, ...]
    """Of the trajectories, in the same order."""

    @property
    def task(self) -> Task:
        """What all of them attempt."""
        return self.trajectories[0].task

    @property
    def alike(self) -> bool:
        """Whether the verifier said the same of every trajectory it could judge; added rewards do not count."""
        return len({reward.verifier for reward in self.rewards if reward.status == "ok"}) < 2


@dataclass(frozen=True, slots=True, eq=False)
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
            object.__setattr__(self, item.name, _as_tensor(value))


@dataclass(frozen=True, slots=True, eq=False)
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
            object.__setattr__(self, item.name, [_as_tensor(value) for value in values])


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """What one step learns from."""

    groups: tuple[Group, ...]
    sequences: tuple[Sequence, ...]
    """One for each trajectory, group after group, with advantages and the engines' log-probs."""

    @cached_property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """Those of all groups, in the order of `sequences`."""
        return tuple(trajectory for group in self.groups for trajectory in group.trajectories)

    @cached_property
    def rewards(self) -> tuple[Reward, ...]:
        """Those of all groups, in the order of `sequences`."""
        return tuple(reward for group in self.groups for reward in group.rewards)

    def scored(self, scores: Scores) -> TrainingBatch:
        """The same with the score pass's log-probs, and the experts it chose."""
        experts: list[torch.Tensor] | list[None] = scores.experts or [None] * len(self.sequences)
        return self._with(
            replace(sequence, old_logprobs=logprobs, experts=chosen)
            for sequence, logprobs, chosen in zip(self.sequences, scores.logprobs, experts, strict=True)
        )

    def with_reference(self, scores: Scores) -> TrainingBatch:
        """The same with the log-probs of the frozen reference."""
        return self._with(
            replace(sequence, reference_logprobs=logprobs)
            for sequence, logprobs in zip(self.sequences, scores.logprobs, strict=True)
        )

    def _with(self, sequences: Iterable[Sequence]) -> TrainingBatch:
        return TrainingBatch(self.groups, tuple(sequences))


def _joined(parts: list[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])


def _as_array(value: Any) -> Any:
    return value if value is None or isinstance(value, int) else value.detach().cpu().numpy()


def _as_tensor(value: Any) -> Any:
    import torch

    # A copy: arrays that come through shared memory are read-only.
    return torch.tensor(value) if isinstance(value, np.ndarray) else value
