"""One attempt at a task, turn by turn: what the policy wrote, what the environment answered, and how it ended.

    request --> engine --> part of a turn ... turn --> call --> environment --> answer --> request ... --> trajectory

A plain state machine: nothing here waits, and who carries requests and calls does not matter to it. Without an
environment a conversation is over with its first turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from megatron_entropic.config.data import EnvironmentConfig
from megatron_entropic.config.run import Config
from megatron_entropic.types import (
    CUT,
    GenerationRequest,
    Origin,
    Response,
    Segment,
    Task,
    Tokens,
    Trajectory,
    Verdict,
    derived_seed,
)

Ending = Literal["", "over", "turns", "length", "timeout", "error", "lost"]
"""Why a conversation ended. over: its environment said so. turns, length: a limit. timeout, error: its environment took
too long or raised. lost: the process that it ran in died, twice. Empty while it goes on, and for single answers."""
FAILURES = ("timeout", "error", "lost")
"""Endings after which nobody knows what the conversation was worth."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a conversation may go."""

    max_turns: int
    max_turn_tokens: int
    """Most tokens that the policy may write in a turn."""
    max_tokens: int
    """Most tokens after a prompt, those of the environment included."""
    max_prompt_tokens: int
    """Most tokens that an environment may begin with."""

    @classmethod
    def of(cls, config: EnvironmentConfig | None, max_response_tokens: int, max_prompt_tokens: int) -> Limits:
        """Limits of `environment`; None: one turn."""
        if config is None:
            return cls(1, max_response_tokens, max_response_tokens, max_prompt_tokens)
        longest = min(config.max_turn_tokens or max_response_tokens, max_response_tokens)
        return cls(config.max_turns, longest, max_response_tokens, max_prompt_tokens)


@dataclass(frozen=True, slots=True)
class Key:
    """Name of a turn, the same in a replay: who began the conversation, which one of a group it is, which turn."""

    group: str
    """STEP/PLACE, or that of a benchmark's problem."""
    sample: int
    turn: int


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What an environment is asked: to begin, or to answer a turn."""

    key: Key
    task: Task
    turns: tuple[Tokens, ...]
    """All turns of the policy so far, the one to answer last; empty: begin."""
    answers: tuple[Tokens, ...]
    """What the environment began with and answered so far, to get to the same state in another process."""
    room: int
    """Most tokens that the answer may have."""
    prompt_room: int
    """Most tokens that a prompt may have: what it begins with, or a new context."""
    last: Ending = ""
    """Limit that the conversation has reached, so that no turn can follow in this context; empty: none."""

    @property
    def ends(self) -> bool:
        """Whether no turn can follow in another context either."""
        return self.last == "turns"


_JSON_FIELDS = ("ending", "new_context", "reward", "seconds", "differences")
"""Fields of an `Answer` that JSON holds as they are."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What an environment says: tokens to go on with, or the end."""

    tokens: Tokens | None
    ending: Ending = ""
    """Why the conversation ends, where there are no tokens."""
    new_context: bool = False
    """Whether the tokens are a prompt that replaces all that was before."""
    reward: float | None = None
    """Its reward; None: a verifier judges it, or nobody can."""
    message: str = ""
    """Words for a failure."""
    seconds: float = 0.0
    """Time that it took, of which others may have had the process."""
    differences: int = 0
    """Number of answers that were others when they were asked for again, in another process."""

    def row(self) -> dict[str, Any]:
        """The answer as JSON types."""
        # A broken tool's words may hold half a surrogate pair, which no UTF-8 has.
        message = self.message.encode("utf-8", "backslashreplace").decode()
        tokens = None if self.tokens is None else self.tokens.tolist()
        return {name: getattr(self, name) for name in _JSON_FIELDS} | {"tokens": tokens, "message": message}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Answer:
        """The answer that `row` wrote; other keys are not looked at."""
        tokens = None if row["tokens"] is None else np.array(row["tokens"], np.int32)
        return cls(tokens, message=row["message"], **{name: row[name] for name in _JSON_FIELDS})

    @property
    def verdict(self) -> Verdict | None:
        """What the environment says of the whole conversation; None: that a verifier judges it."""
        if self.ending in FAILURES:
            status: Literal["timeout", "error"] = "timeout" if self.ending == "timeout" else "error"
            return Verdict(status, message=f"environment: {self.message}")
        return None if self.reward is None else Verdict("ok", self.reward)


Answered = Callable[[Answer], None]
"""Function that takes the answer to a call, in any thread."""


class Environments(Protocol):
    """What carries calls to environments, wherever they are."""

    def ask(self, call: Call, answered: Answered) -> None:
        """Begin a call; `answered` gets its answer once, whatever becomes of processes."""

    def check(self) -> None:
        """Raise what went wrong outside of any conversation."""

    def take_metrics(self) -> dict[str, float]:
        """Metrics since the last call.

        time/environment_mean_s, environment_max_s   time of one call
        environment/rebuilt_differences              answers that were others when they were asked for again
        environment/restarts                         processes that were replaced
        """


@dataclass(slots=True)
class Conversation:
    """One attempt at a task, as far as it has come."""

    task: Task
    sample: int
    seed: int
    """Seed of the first turn; that of turn j is a function of it and of j."""
    group: str
    limits: Limits
    segments: list[Segment] = field(default_factory=list)
    """All that was written, in all contexts, a new one beginning with a segment that is its prompt."""
    finish_reason: str = ""
    """Why the last turn ended, as vLLM says it; empty while it is being written."""
    ending: Ending = ""
    verdict: Verdict | None = None
    begun: bool = False
    """Whether the environment has said what the prompt is."""
    complete: bool = False
    """Whether it is a single answer at its end."""

    @property
    def over(self) -> bool:
        """Whether there is nothing more to come."""
        return self.complete or bool(self.ending)

    @property
    def turns(self) -> list[Tokens]:
        """The turns of the policy, the last of which may still be written, each [n] int32."""
        found: list[list[Tokens]] = []
        before = Origin.ENVIRONMENT
        for segment in self.segments:
            if segment.origin is Origin.POLICY:
                if before is not Origin.POLICY:
                    found.append([])
                found[-1].append(segment.tokens)
            before = segment.origin
        return [np.concatenate(parts) for parts in found]

    @property
    def turn(self) -> int:
        """Number of the turn that is being written or was last, counted from 1."""
        waits = not self.segments or self.segments[-1].origin is not Origin.POLICY
        return len(self.turns) + waits

    @property
    def turn_group(self) -> str:
        """Name of the group in the schedule of engines: each turn has one of its own, so that none comes twice."""
        return self.group if self.turn == 1 else f"{self.group}/turn {self.turn}"

    @property
    def request(self) -> GenerationRequest:
        """What an engine is to continue: the turn from its beginning, or from where it was cut."""
        done = 0
        for segment in reversed(self.segments):
            if segment.origin is not Origin.POLICY:
                break
            done += segment.tokens.size
        seed = self.seed if self.turn == 1 else derived_seed(self.seed, "turn", self.turn)
        tokens = np.concatenate(self.read(len(self.segments)))
        limit = min(self.limits.max_turn_tokens, self._room + done)
        return GenerationRequest(tokens, seed, done, limit)

    @property
    def call(self) -> Call:
        """What the environment is to be asked now: to begin, or to answer the turn that has ended."""
        turns = tuple(self.turns) if self.begun else ()
        answers = [segment.tokens for segment in self.segments if segment.origin is not Origin.POLICY]
        last: Ending = ""
        if len(turns) == self.limits.max_turns:
            last = "turns"
        elif turns and self._room < 2:  # one token of an answer, and one to write after it
            last = "length"
        key = Key(self.group, self.sample, len(turns))
        said = (self.task.tokens, *answers) if turns else ()
        return Call(key, self.task, turns, said, max(self._room - 1, 0), self.limits.max_prompt_tokens, last)

    def read(self, number: int) -> list[Tokens]:
        """Tokens that stand before the segment `number` where the policy reads on, the prompt first."""
        before = self.segments[:number]
        starts = [place for place, segment in enumerate(before) if segment.origin is Origin.CONTEXT]
        parts = [segment.tokens for segment in before[starts[-1] if starts else 0 :]]
        return parts if starts else [self.task.tokens, *parts]

    def add(self, response: Response) -> bool:
        """Take a part of a turn; returns whether the turn is at its end."""
        if response.segment.tokens.size:
            self.segments.append(response.segment.copied())
        if response.finish_reason == CUT:
            return False
        self.finish_reason = response.finish_reason
        return True

    def answered(self, answer: Answer) -> None:
        """Take what the environment says."""
        if answer.tokens is None:
            self.ending, self.verdict = answer.ending, answer.verdict
        elif not self.begun:
            self.begun = True
            self.task = self.task.with_prompt(answer.tokens)
        else:
            said = Segment.of_context(answer.tokens) if answer.new_context else Segment.of_environment(answer.tokens)
            self.segments.append(said)
            self.finish_reason = ""

    def end(self) -> None:
        """End a single answer, which no environment has a say in."""
        self.complete = True

    def trajectory(self, decode: Callable[[Tokens], str]) -> Trajectory:
        """The conversation as it is to be judged; `decode` makes text of tokens."""
        if self.complete:
            return self._single_answer(decode)
        written = [segment.tokens for segment in self.segments if segment.origin is Origin.POLICY]
        text = decode(np.concatenate([np.empty(0, np.int32), *written]))
        reason = self.finish_reason or "stop"
        whole = Trajectory(self.task, self.sample, (), reason, text, self.verdict, self.ending)
        return whole.with_segments(self.segments)

    def _single_answer(self, decode: Callable[[Tokens], str]) -> Trajectory:
        """Trajectory without an environment; its tokens lie in one array, as those who train on it want them."""
        tokens, start = np.concatenate([self.task.tokens, *(s.tokens for s in self.segments)]), self.task.tokens.size
        for number, segment in enumerate(self.segments):
            end = start + segment.tokens.size
            self.segments[number], start = replace(segment, tokens=tokens[start:end]), end
        reason = self.finish_reason or "stop"
        return Trajectory(self.task, self.sample, tuple(self.segments), reason, decode, whole=tokens)

    @property
    def _room(self) -> int:
        """Number of tokens that may still come after the prompt, whoever writes them."""
        return self.limits.max_tokens - sum(tokens.size for tokens in self.read(len(self.segments))[1:])


def new_conversation(
    config: Config, task: Task, sample: int, *, seed: int, group: str, max_response_tokens: int
) -> Conversation:
    """A conversation that has not begun; without an environment its first turn can be asked for at once."""
    section = config.environment.section
    limits = Limits.of(section, max_response_tokens, config.data.max_prompt_tokens)
    return Conversation(task, sample, seed, group, limits, begun=section is None)


def training_attempt(config: Config, task: Task, step: int, place: int, sample: int) -> Conversation:
    """An attempt at the task at a place of a training step, replacements included.

    Its seed is made from run, step, place and sample: what is sampled depends neither on the number of engines nor on
    restarts or a lag, and a task that comes twice is sampled anew.
    """
    seed = derived_seed(config.run.seed, step, place, sample)
    longest = config.rollout.max_response_tokens
    return new_conversation(config, task, sample, seed=seed, group=f"{step}/{place}", max_response_tokens=longest)
