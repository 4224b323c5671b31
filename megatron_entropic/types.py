"""The plain types that cross room borders, each filled in by one room and changed by none.

    Task ---------> GenerationRequest --> Response --> Trajectory ----> Group ---------> TrainingBatch
    data            driver                engine       driver: text     verifiers:       driver: advantages,
                    no ground truth       one segment  of segments      rewards          then scores

Shapes: P tokens of a prompt, L tokens of a sequence, C = L - P of them after the prompt, R of those written by the
policy: its response. Where no environment takes part, R is C.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

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
    """Token ids of the prompt as the model reads it, [P] int32."""
    text: str
    """Text of the prompt, with template."""
    ground_truth: Any
    data_source: str = ""
    extra_info: dict[str, Any] = field(default_factory=dict)

    def with_prompt(self, tokens: Tokens) -> Task:
        """The same problem with another prompt, [P] int32."""
        return self if np.array_equal(tokens, self.tokens) else replace(self, tokens=tokens)


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """One continuation that an engine shall sample."""

    tokens: Tokens
    """Token ids that are continued, [n] int32: the prompt, earlier turns, and what this turn has already."""
    seed: int
    """Seed of this turn alone, so that it depends neither on its neighbours in the batch nor on restarts."""
    done: int = 0
    """Number of the last of `tokens` that belong to the turn; they count towards its length."""
    limit: int | None = None
    """Most tokens of the turn, those done included; None: `max_response_tokens` of its sampling."""

    @property
    def own_seed(self) -> int:
        """Seed of the tokens still to come, a function of the turn's seed and of the tokens done."""
        return derived_seed(self.seed, "from", self.done) if self.done else self.seed

    def continued(self, tokens: Tokens) -> GenerationRequest:
        """The request for what comes after `tokens`, which were sampled for this one."""
        return replace(self, tokens=np.concatenate([self.tokens, tokens]), done=self.done + tokens.size)


def derived_seed(*names: str | int) -> int:
    """Seed of one response, 31 bits, made from `names`, which identify it; neighbouring names give unrelated seeds."""
    key = "/".join(map(str, names)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") >> 1


NO_VERSION, NEW_CONTEXT = -1, -2
"""Weights versions of what no weights wrote: the words of an environment, and the prompt of a context that replaces
what came before it."""


class Origin(Enum):
    """The side that wrote the tokens of a segment, or what else they are."""

    POLICY = "policy"
    ENVIRONMENT = "environment"
    CONTEXT = "context"
    """A prompt with which the conversation goes on, instead of all that was before."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive tokens after a prompt that were written by one side, and sampled from one version of the weights."""

    tokens: Tokens
    """Token ids, [n] int32; they include the end-of-sequence token when the engine stopped at it."""
    logprobs: Logprobs
    """Log pi_engine(token) at the rollout temperature, [n] float32; [0] where the environment wrote the tokens."""
    weights_version: int
    """Version of the weights that sampled the tokens; NO_VERSION and NEW_CONTEXT where the environment wrote them."""
    policy_logprobs: Logprobs | None = None
    """Log-probs of the same tokens as the policy itself computes them with those weights, [n] float32.

    None where nobody has asked the policy: it has those weights still, or rollouts do not run ahead.
    """

    @classmethod
    def of_environment(cls, tokens: Tokens) -> Segment:
        """Tokens that the environment wrote, [n] int32."""
        return cls(tokens, np.empty(0, np.float32), NO_VERSION)

    @classmethod
    def of_context(cls, tokens: Tokens) -> Segment:
        """Prompt of a context that replaces what came before it, [n] int32."""
        return cls(tokens, np.empty(0, np.float32), NEW_CONTEXT)

    @property
    def origin(self) -> Origin:
        """The side that wrote the tokens."""
        others = {NO_VERSION: Origin.ENVIRONMENT, NEW_CONTEXT: Origin.CONTEXT}
        return others.get(self.weights_version, Origin.POLICY)

    @property
    def sampling_logprobs(self) -> Logprobs:
        """`policy_logprobs`, with NaN where nobody has asked the policy, in the shape of `logprobs`."""
        missing = np.full(self.logprobs.size, np.nan, np.float32)
        return missing if self.policy_logprobs is None else self.policy_logprobs

    def copied(self) -> Segment:
        """The same segment with arrays of its own: those that came through shared memory keep it occupied."""
        return replace(self, tokens=self.tokens.copy(), logprobs=self.logprobs.copy())


def joined(segments: list[Segment]) -> Segment:
    """One segment of consecutive ones that the policy wrote under one version of the weights."""
    first, *others = segments
    assert all(one.weights_version == first.weights_version for one in others), "one version"
    tokens, logprobs = (one.tokens for one in segments), (one.logprobs for one in segments)
    return replace(first, tokens=np.concatenate([*tokens]), logprobs=np.concatenate([*logprobs]))


CUT = "cut"
"""The finish reason of a response that is not at its end: new weights came, or the engine had to stop."""


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """An engine's answer to a request."""

    segment: Segment
    finish_reason: str
    """Reason why generation ended: stop or length, as vLLM says it; CUT where it goes on later."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier or an environment says of a response: a reward, or the reason why there is none."""

    status: Literal["ok", "timeout", "error"]
    reward: float = 0.0
    message: str = ""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Metrics of how it came about, by name: their sum over responses is logged, the mean where a name ends so."""


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One attempt at a task: all that was written after its prompt, by the policy and by the environment.

    Where an environment replaced the context, it is the last one; the `earlier` ones are trajectories of their own.
    """

    task: Task
    sample_index: int
    """Number of this attempt among those at the task, from 0."""
    segments: tuple[Segment, ...]
    finish_reason: str
    """Reason why the last segment that the policy wrote ended."""
    wording: str | Callable[[Tokens], str]
    """`text`, or the function that makes it of the tokens that the policy wrote, wherever it is read."""
    verdict: Verdict | None = None
    """What the environment says it is worth, or that nobody can say; None: verifiers judge the text."""
    ending: str = ""
    """Why a conversation with an environment ended, see `environments.conversation.Ending`; empty without one."""
    earlier: tuple[Trajectory, ...] = ()
    """The contexts that were replaced, in order: what was learned in them counts as much."""
    whole: Tokens | None = None
    """Prompt and continuation as one array, [L] int32, in which those of the segments lie; None: each has its own."""

    @property
    def text(self) -> str:
        """Text of what the policy wrote, without special tokens."""
        # Not kept where it can be made again: of long responses it takes as much memory as their tokens.
        if isinstance(self.wording, str):
            return self.wording
        # As an array: of a list, transformers looks at the type of each element, half of the time of decoding.
        return self.wording(_joined([segment.tokens for segment in self.written], np.int32))

    @property
    def contexts(self) -> tuple[Trajectory, ...]:
        """All contexts of the attempt in which the policy wrote something, in order."""
        return tuple(one for one in (*self.earlier, self) if one.response_length)

    def with_segments(self, segments: Iterable[Segment]) -> Trajectory:
        """The attempt with what was written in all its contexts, each new one behind a segment that is its prompt."""
        *earlier, (task, own) = _split(self.earlier[0].task if self.earlier else self.task, segments)
        before = tuple(replace(self, task=task, segments=own, earlier=()) for task, own in earlier)
        return replace(self, task=task, segments=own, earlier=before)

    @property
    def tokens(self) -> Tokens:
        """Token ids of the prompt followed by those of all segments, [L] int32."""
        return self.whole if self.whole is not None else np.concatenate([self.task.tokens, self.continuation])

    @property
    def continuation(self) -> Tokens:
        """Token ids of all segments, [C] int32."""
        return _joined([segment.tokens for segment in self.segments], np.int32)

    @property
    def written(self) -> tuple[Segment, ...]:
        """The segments that the policy wrote."""
        return tuple(segment for segment in self.segments if segment.origin is Origin.POLICY)

    @property
    def mask(self) -> npt.NDArray[np.bool_] | None:
        """Which tokens of the continuation the policy wrote, [C]; None: all of them."""
        if len(self.written) == len(self.segments):
            return None
        sizes = [segment.tokens.size for segment in self.segments]
        return np.repeat([segment.origin is Origin.POLICY for segment in self.segments], sizes)

    @property
    def turn_numbers(self) -> npt.NDArray[np.int64]:
        """Turn in which the policy wrote each token, counted from 1, [R]; the environment spoke between two turns."""
        turn, numbers, before = 0, [], Origin.ENVIRONMENT
        for segment in self.segments:
            turn += segment.origin is Origin.POLICY and before is Origin.ENVIRONMENT
            before = segment.origin
            numbers.append(turn)
        written = [number for number, s in zip(numbers, self.segments, strict=True) if s.origin is Origin.POLICY]
        return np.repeat(np.array(written, np.int64), [segment.tokens.size for segment in self.written])

    @property
    def rollout_logprobs(self) -> Logprobs:
        """Log pi_engine(token) at the rollout temperature, [R] float32."""
        return _joined([segment.logprobs for segment in self.written], np.float32)

    @property
    def sampling_logprobs(self) -> Logprobs | None:
        """Log-probs by the policy with the weights that sampled each token, as far as it was asked for them.

        Shape [R] float32, NaN where it was not; None if it was nowhere.
        """
        if all(segment.policy_logprobs is None for segment in self.written):
            return None
        return _joined([segment.sampling_logprobs for segment in self.written], np.float32)

    @property
    def response_length(self) -> int:
        """Number of tokens that the policy wrote, R."""
        return sum(segment.tokens.size for segment in self.written)

    @property
    def continuation_length(self) -> int:
        """Number of tokens after the prompt, C."""
        return sum(segment.tokens.size for segment in self.segments)

    @property
    def weights_version(self) -> int:
        """The oldest version of the weights that wrote a part of the trajectory; NO_VERSION if none did."""
        return min((segment.weights_version for segment in self.written), default=NO_VERSION)


@dataclass(frozen=True, slots=True)
class Reward:
    """Reward of one trajectory, with the verdict behind it."""

    value: float
    """Reward that the policy is trained on: the verifier's reward, added rewards and punishments."""
    verifier: float
    """The verifier's own part of the reward; 0 where it failed."""
    status: str
    """Outcome of the verifiers: ok, timeout or error; a verifier that failed is not a wrong answer."""

    @property
    def correct(self) -> bool:
        """Whether the verifier gave a positive reward; added rewards do not count."""
        return self.verifier > 0


@dataclass(frozen=True, slots=True)
class Group:
    """The trajectories of one task with their rewards, of which advantages are computed."""

    trajectories: tuple[Trajectory, ...]
    rewards: tuple[Reward, ...]
    """Rewards of the trajectories, in the same order."""

    @property
    def task(self) -> Task:
        """The task that all trajectories attempt."""
        return self.trajectories[0].task

    @property
    def success(self) -> float:
        """Share of the trajectories that are right."""
        return sum(reward.correct for reward in self.rewards) / len(self.rewards)

    @property
    def alike(self) -> bool:
        """Whether the verifier said the same of every trajectory it could judge; added rewards do not count."""
        return len({reward.verifier for reward in self.rewards if reward.status == "ok"}) < 2


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """One prompt with what follows it; the policy scores and trains on what it wrote of that."""

    tokens: torch.Tensor
    """Token ids of the prompt followed by those after it, [L] int32 or int64; micro-batches have int64."""
    prompt_length: int
    advantages: torch.Tensor | None = None
    """Advantage of each response token, [R] float32."""
    old_logprobs: torch.Tensor | None = None
    """Log-probs of the policy that is about to be updated (score pass), [R] float32."""
    rollout_logprobs: torch.Tensor | None = None
    """Log-probs as the engine reported them, [R] float32."""
    sampling_logprobs: torch.Tensor | None = None
    """Log-probs of the policy with the weights that sampled each token, [R] float32.

    NaN where those are the weights of the score pass, until it has come; None where all tokens are of such weights.
    """
    reference_logprobs: torch.Tensor | None = None
    """Log-probs of the frozen reference, [R] float32; None without a KL penalty."""
    experts: torch.Tensor | None = None
    """Experts to which the score pass routed each token, [L, layers with experts, k] uint8 or int16.

    None without router replay.
    """
    success: float | None = None
    """Share of right responses in the prompt's whole group, 0 to 1; None where nothing was judged."""
    mask: torch.Tensor | None = None
    """Which tokens after the prompt the policy wrote, [C] bool; None: all of them."""

    @property
    def response_length(self) -> int:
        """Number of tokens that the policy wrote, R: those that have log-probs, advantages and a share of the loss."""
        written = self.tokens.numel() - self.prompt_length
        return written if self.mask is None else int(self.mask.sum())

    @property
    def first_turn_length(self) -> int:
        """Number of tokens that the policy wrote before an environment said something."""
        if self.mask is None or bool(self.mask.all()):
            return self.response_length
        return int(self.mask.int().argmin())

    @property
    def response_places(self) -> torch.Tensor:
        """Places in `tokens` of those that the policy wrote, [R] int64."""
        import torch

        places = torch.arange(self.prompt_length, self.tokens.numel())
        return places if self.mask is None else places[self.mask]

    @property
    def own_logprobs(self) -> torch.Tensor | None:
        """`sampling_logprobs`, or `old_logprobs` where no token is older than the weights of the score pass."""
        return self.old_logprobs if self.sampling_logprobs is None else self.sampling_logprobs

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes as arrays: pickling a small tensor takes a hundred times as long.

        A value that all tokens have, as an advantage, travels once.
        """
        # Not __getstate__: dataclasses of Python 3.11.2 replace it where a class is frozen and has slots.
        return _rebuilt_sequence, tuple(_as_array(getattr(self, item.name)) for item in fields(self))


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Per-token statistics of some sequences, in the caller's order."""

    logprobs: list[torch.Tensor]
    """Log-probs of each sequence's response tokens, [R] float32, at the temperature asked for."""
    entropies: list[torch.Tensor]
    """Entropies at the same tokens, [R] float32 each, nats, of the full softmax at the same temperature."""
    experts: list[torch.Tensor] = field(default_factory=list)
    """Experts of each sequence's tokens, as `Sequence.experts` holds them; empty without router replay."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes as arrays, like `Sequence`."""
        return _rebuilt_scores, tuple([_as_array(value) for value in getattr(self, item.name)] for item in fields(self))


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """Groups of one step, and the sequences of them that it trains on."""

    groups: tuple[Group, ...]
    sequences: tuple[Sequence, ...]
    """Sequences, one for each of `trajectories`, with advantages and the engines' log-probs."""

    @cached_property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """What the policy wrote, context by context of each attempt, group after group."""
        return tuple(context for group in self.groups for one in group.trajectories for context in one.contexts)

    @cached_property
    def rewards(self) -> tuple[Reward, ...]:
        """Reward of each of `trajectories`; contexts of one attempt have one reward."""
        return tuple(
            reward
            for group in self.groups
            for one, reward in zip(group.trajectories, group.rewards, strict=True)
            for _ in one.contexts
        )

    def scored(self, scores: Scores) -> TrainingBatch:
        """The same batch with the score pass's log-probs, and the experts it chose."""
        experts: list[torch.Tensor] | list[None] = scores.experts or [None] * len(self.sequences)
        return self._with(
            replace(sequence, old_logprobs=logprobs, sampling_logprobs=_filled(sequence, logprobs), experts=chosen)
            for sequence, logprobs, chosen in zip(self.sequences, scores.logprobs, experts, strict=True)
        )

    def with_reference(self, scores: Scores) -> TrainingBatch:
        """The same batch with the log-probs of the frozen reference."""
        return self._with(
            replace(sequence, reference_logprobs=logprobs)
            for sequence, logprobs in zip(self.sequences, scores.logprobs, strict=True)
        )

    def _with(self, sequences: Iterable[Sequence]) -> TrainingBatch:
        return TrainingBatch(self.groups, tuple(sequences))


def _split(task: Task, segments: Iterable[Segment]) -> list[tuple[Task, tuple[Segment, ...]]]:
    """Contexts of an attempt, each with its prompt."""
    found: list[tuple[Task, list[Segment]]] = [(task, [])]
    for segment in segments:
        if segment.origin is Origin.CONTEXT:
            found.append((task.with_prompt(segment.tokens), []))
        else:
            found[-1][1].append(segment)
    return [(task, tuple(own)) for task, own in found]


def _filled(sequence: Sequence, scored: torch.Tensor) -> torch.Tensor | None:
    """The sampling log-probs of a sequence, those that were missing being of the weights that have scored it now."""
    sampling = sequence.sampling_logprobs
    return None if sampling is None else sampling.where(~sampling.isnan(), scored)


def _joined(parts: list[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])


def _rebuilt_sequence(*values: Any) -> Sequence:
    return Sequence(*map(_as_tensor, values))


def _rebuilt_scores(*columns: list[Any]) -> Scores:
    return Scores(*([_as_tensor(value) for value in values] for values in columns))


@dataclass(frozen=True, slots=True)
class _Repeated:
    """An array of equal values."""

    value: npt.NDArray[Any]
    """The value, [1]."""
    size: int


def _as_array(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    array = value.detach().cpu().numpy()
    return _Repeated(array[:1].copy(), array.size) if array.strides == (0,) and array.size else array


def _as_tensor(value: Any) -> Any:
    import torch

    if isinstance(value, _Repeated):
        return torch.tensor(value.value).expand(value.size)
    # A copy: arrays that come through shared memory are read-only.
    return torch.tensor(value) if isinstance(value, np.ndarray) else value
