"""Sampling of attempts at tasks: by which engine, from which seed, and again after an engine was lost."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from megatron_entropic.cluster.cluster import Cluster
from megatron_entropic.cluster.dispatch import Arrived, Ask, Dispatcher
from megatron_entropic.config.run import Config, Sampling
from megatron_entropic.data.tokenizer import Tokenizer
from megatron_entropic.environments.conversation import (
    Answer,
    Conversation,
    Environments,
    new_conversation,
    training_attempt,
)
from megatron_entropic.types import (
    CUT,
    GenerationRequest,
    Response,
    Segment,
    Task,
    Trajectory,
    derived_seed,
    joined,
)

_POLL_S = 0.2

Take = Callable[[int, Trajectory], None]
"""Function that takes a position and its trajectory, as it comes; which come first depends on the clock."""


ArrivedTogether = Callable[[list[tuple[int, Response]]], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """Requests that are answered together."""

    groups: list[list[GenerationRequest]]
    """Requests, group after group; their positions count through all groups."""
    sampling: Sampling
    phase: str
    """Name of what is going on, for errors."""


class Answerer(Protocol):
    """What lets engines answer requests: each once, whatever becomes of engines."""

    @property
    def version(self) -> int:
        """Version of the weights that answer."""

    def answer(self, asked: Asked, arrived: ArrivedTogether, while_waiting: Callable[[], None]) -> None:
        """Return when every request is answered.

        Args:
            asked: the requests.
            arrived: gets responses with the positions of their requests, as they come.
            while_waiting: called at least about once a second; may raise.
        """


class DealtOut:
    """An `Answerer` that deals whole groups out to the engines in turn, so that each has the same ones every time.

    An engine that is lost is replaced in place, up to `cluster.max_engine_restarts` times in all: the new one gets the
    current weights and the tasks that the lost one had. It samples the same responses, because each has a seed of its
    own.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @property
    def version(self) -> int:
        """Version of the weights that were published last."""
        return self._cluster.version

    def answer(self, asked: Asked, arrived: ArrivedTogether, while_waiting: Callable[[], None]) -> None:
        """Ask for every group once, and again for all requests of a lost engine; see `Answerer`.

        In another batch the last bits of log-probs could differ, so its successor gets the same requests; what had
        come from the lost one already is the same and goes to `arrived` no second time.
        """
        engines, first = self._cluster.engines, 0
        requests: dict[str, list[GenerationRequest]] = {}
        positions: dict[str, list[int]] = {}
        for place, group in enumerate(asked.groups):
            name = engines.names[place % len(engines.names)]
            if group:
                requests.setdefault(name, []).extend(group)
                positions.setdefault(name, []).extend(range(first, first + len(group)))
            first += len(group)
        seen: set[int] = set()

        def take(name: str, answers: list[tuple[int, Response]]) -> None:
            placed = [(positions[name][number], response) for number, response in answers]
            new = [(position, response) for position, response in placed if position not in seen]
            seen.update(position for position, _ in new)
            if new:
                arrived(new)

        while requests:
            with self._cluster.rollout():
                lost = engines.stream(requests, asked.sampling, take, phase=asked.phase, while_waiting=while_waiting)
            if lost:
                engines.replace(lost)
                self._cluster.renew_weights()
            requests = {name: left for name, left in requests.items() if name in lost}


class Queued:
    """An `Answerer` that works beside what is in flight already, for evaluations: the first in the queue."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    @property
    def version(self) -> int:
        """Version of the weights that engines have."""
        return self._dispatcher.version

    def answer(self, asked: Asked, arrived: ArrivedTogether, while_waiting: Callable[[], None]) -> None:
        left = sum(map(len, asked.groups))
        parts: dict[int, list[Segment]] = {}

        def arrive(position: int, response: Response) -> None:
            nonlocal left
            parts.setdefault(position, []).append(response.segment.copied())
            if response.finish_reason != CUT:
                left -= 1
                whole = joined(parts.pop(position))
                arrived([(position, Response(whole, response.finish_reason))])

        asks, first = [], 0
        for place, group in enumerate(asked.groups):
            taking = partial(_shifted, arrive, first)
            name = f"{asked.phase}, version {self._dispatcher.version}/{place}"
            if group:
                asks.append(Ask(name, (-1, place), dict(enumerate(group)), asked.sampling, taking))
            first += len(group)
        with self._dispatcher.turn(while_waiting):
            self._dispatcher.ask(asks)
            self._dispatcher.wait(lambda: left == 0, phase=asked.phase, while_waiting=while_waiting)


def _shifted(arrive: Arrived, first: int, sample: int, response: Response) -> None:
    arrive(first + sample, response)


class Sampler:
    """Makes trajectories of tasks: requests with seeds of their own, answered by engines, with their text."""

    def __init__(
        self, config: Config, answerer: Answerer, tokenizer: Tokenizer, environments: Environments | None = None
    ) -> None:
        """Sample as `rollout` and `evaluation` say.

        Args:
            answerer: what lets engines answer.
            tokenizer: gives responses their text.
            environments: what answers the turns of the policy; None: a response is one turn.
        """
        self._config = config
        self._answerer = answerer
        self._tokenizer = tokenizer
        self.environments = environments

    def generate(
        self,
        tasks: Sequence[Task],
        step: int,
        take: Take = lambda position, trajectory: None,
        *,
        first_place: int = 0,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> list[Trajectory]:
        """Sample `samples_per_prompt` attempts at each task, grouped by task, in the caller's order.

        Every attempt has a seed of its own, see `training_attempt`.

        Args:
            tasks: tasks of the step.
            step: number of the step, counted from 1.
            take: gets every attempt once, with its position in what is returned, as it comes.
            first_place: place of the first task among all that the step asks, replacements included.
            while_waiting: called at least about once a second; may raise.
        """
        config, rollout = self._config, self._config.rollout
        conversations = [
            [training_attempt(config, task, step, place, sample) for sample in range(rollout.samples_per_prompt)]
            for place, task in enumerate(tasks, first_place)
        ]
        return self._hold(conversations, rollout.sampling, take, f"generate (step {step})", while_waiting)

    def answer_benchmark(
        self, name: str, problems: Sequence[Task], take: Take = lambda position, trajectory: None
    ) -> list[Trajectory]:
        """Sample the attempts of an evaluation, grouped by problem: `evaluation.samples(name)` at each.

        Their seeds are functions of evaluation.seed, benchmark, problem and sample, whatever was generated before.
        `take` as in `generate`.
        """
        evaluation, sampling = self._config.evaluation, self._config.evaluation_sampling(name)
        conversations = [
            [
                new_conversation(
                    *(self._config, problem, sample),
                    seed=derived_seed("evaluation", evaluation.seed, name, problem.index, sample),
                    group=f"evaluate ({name}), version {self._answerer.version}/{place}",
                    max_response_tokens=sampling.max_response_tokens,
                )
                for sample in range(evaluation.samples(name))
            ]
            for place, problem in enumerate(problems)
        ]
        return self._hold(conversations, sampling, take, f"evaluate ({name})", lambda: None)

    def _hold(
        self,
        groups: list[list[Conversation]],
        sampling: Sampling,
        take: Take,
        phase: str,
        while_waiting: Callable[[], None],
    ) -> list[Trajectory]:
        """Let conversations come to their ends, turn by turn: the next turn begins when the last of all is answered.

        So the engines' batches are functions of what environments say, and do not depend on when they say it.
        """
        decode = partial(self._tokenizer.decode, skip_special_tokens=True)
        place_of = {id(one): place for place, one in enumerate(one for group in groups for one in group)}
        found: list[Trajectory | None] = [None] * len(place_of)

        def finish(conversation: Conversation) -> None:
            place = place_of[id(conversation)]
            found[place] = trajectory = conversation.trajectory(decode)
            take(place, trajectory)

        def arrived(responses: list[tuple[int, Response]]) -> None:
            for position, response in responses:
                asked[position].add(response)
                if replies is None:
                    asked[position].end()
                    finish(asked[position])
                else:
                    replies.ask(asked[position])

        replies = None if self.environments is None else _Replies(self.environments, while_waiting)
        if replies is not None:
            for group in groups:
                for one in group:
                    replies.ask(one)
            replies.wait(finish)
        turn = 0
        while asked := [one for group in groups for one in group if not one.over]:
            turn += 1
            requests = [[one.request for one in group if not one.over] for group in groups]
            of_turn = Asked(requests, sampling, phase if turn == 1 else f"{phase}, turn {turn}")
            self._answerer.answer(of_turn, arrived, while_waiting)
            if replies is not None:
                replies.wait(finish)
        trajectories = [trajectory for trajectory in found if trajectory is not None]
        assert len(trajectories) == len(found), "every conversation must have come to its end"
        return trajectories


class _Replies:
    """What environments answer to some conversations, which nobody needs before all of it is there."""

    def __init__(self, environments: Environments, while_waiting: Callable[[], None]) -> None:
        self._environments, self._while_waiting = environments, while_waiting
        self._came: queue.SimpleQueue[tuple[Conversation, Answer]] = queue.SimpleQueue()
        self._missing = 0

    def ask(self, conversation: Conversation) -> None:
        """Let the environment begin, or answer the turn that has ended."""
        self._missing += 1
        self._environments.ask(conversation.call, lambda answer: self._came.put((conversation, answer)))

    def wait(self, finish: Callable[[Conversation], None]) -> None:
        """Wait until everything is answered; `finish` gets each conversation that is then over, as it comes."""
        while self._missing:
            try:
                conversation, answer = self._came.get(timeout=_POLL_S)
            except queue.Empty:
                self._while_waiting()
                self._environments.check()
                continue
            self._missing -= 1
            conversation.answered(answer)
            if conversation.over:
                finish(conversation)
