"""The attempts at the tasks of one step, of which some are in flight: asked for, answered, judged, round by round."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile

import numpy as np
import torch

from megatron_entropic.cluster.dispatch import Ask, Dispatcher
from megatron_entropic.config.run import Config
from megatron_entropic.data.tokenizer import Tokenizer
from megatron_entropic.environments.conversation import Answer, Conversation, Environments, training_attempt
from megatron_entropic.rewards import RewardScorer
from megatron_entropic.rewards.scorer import Scoring
from megatron_entropic.rollout.schedule import Moment
from megatron_entropic.training.in_flight import SavedAttempt
from megatron_entropic.training.rollouts import Rounds, grouped
from megatron_entropic.types import (
    GenerationRequest,
    Group,
    Response,
    Segment,
    Sequence,
    Task,
    Trajectory,
)


@dataclass(frozen=True, slots=True)
class Judges:
    """What answers the policy, and what judges it."""

    scorer: RewardScorer
    environments: Environments | None
    """None: a response is one turn."""

    def check(self) -> None:
        """Raise what environments met outside of any conversation."""
        if self.environments is not None:
            self.environments.check()


@dataclass(slots=True)
class Attempt:
    """One attempt at a task, as far as it has come."""

    conversation: Conversation
    trajectory: Trajectory | None = None
    """What was judged. Its segments may be scored later; those of the conversation are."""

    @property
    def segments(self) -> list[Segment]:
        """All that was written so far."""
        return self.conversation.segments

    def up_to(self, number: int) -> Sequence:
        """Sequence whose response is the segment `number`, after all that comes before it."""
        before = self.conversation.read(number)
        tokens = np.concatenate([*before, self.segments[number].tokens])
        return Sequence(torch.from_numpy(tokens), prompt_length=sum(part.size for part in before))


class StepAhead:
    """The attempts of one step, round by round; parts of them arrive in the dispatcher's thread, under its lock."""

    def __init__(
        self,
        step: int,
        rounds: Rounds,
        config: Config,
        dispatcher: Dispatcher,
        judges: Judges,
        tokenizer: Tokenizer,
    ) -> None:
        self.rounds = rounds
        self._step = step
        self._config = config
        self._dispatcher = dispatcher
        self._judges = judges
        self._decode = partial(tokenizer.decode, skip_special_tokens=True)
        self._attempts: dict[tuple[int, int], Attempt] = {}
        self._saved: dict[tuple[int, int], SavedAttempt] = {}
        self._scoring: Scoring | None = None
        self._open_scorings = ExitStack()
        self._first_place = self._unfinished = 0

    def begin(self, saved: dict[tuple[int, int], SavedAttempt]) -> None:
        """Ask for the first round; attempts that were in flight, by place and sample, go on where they were."""
        self._saved = saved
        with self._dispatcher.standing():  # environments answer in threads of their own
            self._begin_round()

    def is_complete(self) -> bool:
        """Whether every round is judged; begins the next one if it is time for it."""
        while self._scoring is not None and not self._unfinished and self._scoring.ready:
            rewards, metrics = self._scoring.finish()
            size = self._config.rollout.samples_per_prompt
            of_round = [key for key in self._attempts if key[0] >= self._first_place]
            trajectories = [one for key in of_round if (one := self._attempts[key].trajectory) is not None]
            self.rounds.judged(grouped(trajectories, rewards, size), metrics)
            self._begin_round()
        return self._scoring is None

    def result(self) -> tuple[list[Group], dict[str, float]]:
        """Groups of the step with all that is known of their segments by now, and metrics of judging them."""
        groups, metrics = self.rounds.result()
        segments = {id(one.trajectory): one.segments for one in self._attempts.values()}
        return [
            replace(group, trajectories=tuple(one.with_segments(segments[id(one)]) for one in group.trajectories))
            for group in groups
        ], metrics

    def saved(self, before: Moment, placed: dict[tuple[str, int], tuple[int, int]]) -> list[SavedAttempt]:
        """Attempts as they were before `before`; `placed` has engine and ticket of those that an engine has."""
        found = []
        for (place, sample), attempt in self._attempts.items():
            one = attempt.conversation
            kept = list(takewhile(lambda s: before.part or s.weights_version < before.version, one.segments))
            engine, ticket = placed.get((one.turn_group, sample), (-1, -1))
            if kept or engine >= 0:
                whole = len(kept) == len(one.segments)
                reason, ending = (one.finish_reason, one.ending) if whole else ("", "")
                found.append(
                    SavedAttempt(
                        *(self._step, place, sample, one.task.index, tuple(kept), reason, engine, ticket),
                        ending=ending,
                        verdict=one.verdict if whole else None,
                        prompt=None if self._judges.environments is None else one.task.tokens,
                    )
                )
        return found

    def sampled_by(self, version: int) -> list[tuple[Attempt, int]]:
        """Attempts with the numbers of their segments that a version sampled and that are not scored with it yet."""
        return [
            (attempt, number)
            for attempt in self._attempts.values()
            for number, segment in enumerate(attempt.segments)
            if segment.weights_version == version and segment.policy_logprobs is None
        ]

    def close(self) -> None:
        """Judge nothing any more."""
        self._open_scorings.close()

    def _begin_round(self) -> None:
        tasks, size = self.rounds.next_tasks(), self._config.rollout.samples_per_prompt
        if not tasks:
            self._scoring = None
            return
        self._first_place, self._unfinished = self.rounds.first_place, len(tasks) * size
        self._scoring = self._open_scorings.enter_context(self._judges.scorer.scoring(len(tasks), size))
        asks = [ask for place, task in enumerate(tasks, self._first_place) for ask in self._asks(place, task)]
        self._dispatcher.ask(asks)

    def _asks(self, place: int, task: Task) -> list[Ask]:
        """What is still to be sampled of a group: together, or each where it was in flight."""
        together: dict[int, GenerationRequest] = {}
        asks = []
        for sample in range(self._config.rollout.samples_per_prompt):
            one = training_attempt(self._config, task, self._step, place, sample)
            self._attempts[place, sample], was = Attempt(one), self._saved.pop((place, sample), None)
            if was is not None:
                one.segments = list(was.segments)
                one.finish_reason, one.ending, one.verdict = was.finish_reason, was.ending, was.verdict
                one.task, one.begun = task if was.prompt is None else task.with_prompt(was.prompt), True
            if one.finish_reason and self._judges.environments is None:
                one.end()
            if one.over:
                self._finish(place, sample)
            elif one.finish_reason or not one.begun:
                self._turn_ended(place, sample)
            elif was is not None and was.engine >= 0:
                # In the order in which its engine had taken them up, before anything else.
                order, engine = (-2, was.ticket), f"engine {was.engine}"
                asks.append(self._ask(place, {sample: one.request}, order, engine))
            elif one.segments and self._judges.environments is not None:
                asks.append(self._ask(place, {sample: one.request}))
            else:
                together[sample] = one.request
        return [*asks, self._ask(place, together)] if together else asks

    def _ask(
        self,
        place: int,
        requests: dict[int, GenerationRequest],
        order: tuple[int, ...] | None = None,
        engine: str | None = None,
    ) -> Ask:
        """What an engine is to be asked for some attempts at one task, which are at the same turn."""
        group = self._attempts[place, next(iter(requests))].conversation.turn_group
        arrived, sampling = partial(self._arrived, place), self._config.rollout.sampling
        return Ask(group, order or (self._step, place), requests, sampling, arrived, engine)

    def _arrived(self, place: int, sample: int, response: Response) -> None:
        if self._attempts[place, sample].conversation.add(response):
            self._turn_ended(place, sample)

    def _turn_ended(self, place: int, sample: int) -> None:
        """Let the environment begin or answer; without one the attempt is at its end."""
        conversation, environments = self._attempts[place, sample].conversation, self._judges.environments
        if environments is None:
            conversation.end()
            self._finish(place, sample)
            self.is_complete()
        else:
            environments.ask(conversation.call, partial(self._answered, place, sample))

    def _answered(self, place: int, sample: int, answer: Answer) -> None:
        """Take what an environment says, in a thread of theirs or in the one that asked."""
        with self._dispatcher.standing():
            conversation = self._attempts[place, sample].conversation
            conversation.answered(answer)
            if conversation.over:
                self._finish(place, sample)
                self.is_complete()
                self._dispatcher.ask([])
            else:
                self._dispatcher.ask([self._ask(place, {sample: conversation.request})])

    def _finish(self, place: int, sample: int) -> None:
        attempt = self._attempts[place, sample]
        attempt.trajectory = attempt.conversation.trajectory(self._decode)
        assert self._scoring is not None, "a round is open"
        position = (place - self._first_place) * self._config.rollout.samples_per_prompt + sample
        self._scoring.add(position, attempt.trajectory)
        self._unfinished -= 1
