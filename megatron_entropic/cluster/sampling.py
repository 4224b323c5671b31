"""Sampling of attempts at tasks: by which engine, from which seed, and again after an engine was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from megatron_entropic.cluster.cluster import Cluster
from megatron_entropic.cluster.dispatch import Arrived, Ask, Dispatcher
from megatron_entropic.config.run import Config, Sampling
from megatron_entropic.data.tokenizer import Tokenizer
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

Take = Callable[[int, Trajectory], None]
"""Function that takes a position and its trajectory, as it comes; which come first depends on the clock."""

_SeedOf = Callable[[int, int], int]
"""Function: (position of the task, number of the sample) -> seed."""


class Answerer(Protocol):
    """What lets engines answer requests: each once, whatever becomes of engines."""

    def answer(
        self,
        groups: list[list[GenerationRequest]],
        sampling: Sampling,
        arrived: Callable[[list[tuple[int, Response]]], None],
        *,
        phase: str,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Return when every request is answered.

        Args:
            groups: requests, group after group; their positions count through all groups.
            sampling: temperature, limits.
            arrived: gets responses with the positions of their requests, as they come.
            phase: name of what is going on, for errors.
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

    def answer(
        self,
        groups: list[list[GenerationRequest]],
        sampling: Sampling,
        arrived: Callable[[list[tuple[int, Response]]], None],
        *,
        phase: str,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Ask for every group once, and again for all requests of a lost engine; see `Answerer`.

        In another batch the last bits of log-probs could differ, so its successor gets the same requests; what had
        come from the lost one already is the same and goes to `arrived` no second time.
        """
        engines, size = self._cluster.engines, len(groups[0]) if groups else 0
        requests: dict[str, list[GenerationRequest]] = {}
        positions: dict[str, list[int]] = {}
        for place, group in enumerate(groups):
            name = engines.names[place % len(engines.names)]
            requests.setdefault(name, []).extend(group)
            positions.setdefault(name, []).extend(range(place * size, (place + 1) * size))
        seen: set[int] = set()

        def take(name: str, answers: list[tuple[int, Response]]) -> None:
            placed = [(positions[name][number], response) for number, response in answers]
            new = [(position, response) for position, response in placed if position not in seen]
            seen.update(position for position, _ in new)
            if new:
                arrived(new)

        while requests:
            with self._cluster.rollout():
                lost = engines.stream(requests, sampling, take, phase=phase, while_waiting=while_waiting)
            if lost:
                engines.replace(lost)
                self._cluster.renew_weights()
            requests = {name: asked for name, asked in requests.items() if name in lost}


class Queued:
    """An `Answerer` that works beside what is in flight already, for evaluations: the first in the queue."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def answer(
        self,
        groups: list[list[GenerationRequest]],
        sampling: Sampling,
        arrived: Callable[[list[tuple[int, Response]]], None],
        *,
        phase: str,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """See `Answerer`."""
        left = sum(map(len, groups))
        parts: dict[int, list[Segment]] = {}

        def arrive(position: int, response: Response) -> None:
            nonlocal left
            parts.setdefault(position, []).append(response.segment.copied())
            if response.finish_reason != CUT:
                left -= 1
                whole = joined(parts.pop(position))
                arrived([(position, Response(whole, response.finish_reason))])

        asks, first = [], 0
        for place, group in enumerate(groups):
            taking = partial(_shifted, arrive, first)
            name = f"{phase}, version {self._dispatcher.version}/{place}"
            asks.append(Ask(name, (-1, place), dict(enumerate(group)), sampling, taking))
            first += len(group)
        with self._dispatcher.turn(while_waiting):
            self._dispatcher.ask(asks)
            self._dispatcher.wait(lambda: left == 0, phase=phase, while_waiting=while_waiting)


def _shifted(arrive: Arrived, first: int, sample: int, response: Response) -> None:
    arrive(first + sample, response)


class Sampler:
    """Makes trajectories of tasks: requests with seeds of their own, answered by engines, with their text."""

    def __init__(self, config: Config, answerer: Answerer, tokenizer: Tokenizer) -> None:
        """Sample as `rollout` and `evaluation` say; `tokenizer` gives responses their text."""
        self._config = config
        self._answerer = answerer
        self._tokenizer = tokenizer

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

        Every attempt has a seed of its own, made from run, step, the task's place in the step, and sample: what is
        sampled depends neither on the number of engines nor on restarts, and a task that comes twice is sampled anew.

        Args:
            tasks: tasks of the step.
            step: number of the step, counted from 1.
            take: gets every attempt once, with its position in what is returned, as it comes.
            first_place: place of the first task among all that the step asks, replacements included.
            while_waiting: called at least about once a second; may raise.
        """
        seed, rollout = self._config.run.seed, self._config.rollout
        attempts = _Attempts(tasks, rollout.samples_per_prompt, self._tokenizer, take)
        self._answerer.answer(
            attempts.requests(lambda place, sample: derived_seed(seed, step, first_place + place, sample)),
            rollout.sampling,
            attempts.arrived,
            phase=f"generate (step {step})",
            while_waiting=while_waiting,
        )
        return attempts.all()

    def answer_benchmark(
        self, name: str, problems: Sequence[Task], take: Take = lambda position, trajectory: None
    ) -> list[Trajectory]:
        """Sample the attempts of an evaluation, grouped by problem: `evaluation.samples(name)` at each.

        Their seeds are functions of evaluation.seed, benchmark, problem and sample, whatever was generated before.
        `take` as in `generate`.
        """
        evaluation = self._config.evaluation
        attempts = _Attempts(problems, evaluation.samples(name), self._tokenizer, take)
        self._answerer.answer(
            attempts.requests(
                lambda place, sample: derived_seed("evaluation", evaluation.seed, name, problems[place].index, sample)
            ),
            self._config.evaluation_sampling,
            attempts.arrived,
            phase=f"evaluate ({name})",
        )
        return attempts.all()


class _Attempts:
    """Trajectories of a number of attempts at each task, made of responses as they come."""

    def __init__(self, tasks: Sequence[Task], samples: int, tokenizer: Tokenizer, take: Take) -> None:
        self._tasks, self._samples, self._take = tasks, samples, take
        self._decode = partial(tokenizer.batch_decode, skip_special_tokens=True)
        self._found: list[Trajectory | None] = [None] * (len(tasks) * samples)

    def requests(self, seed_of: _SeedOf) -> list[list[GenerationRequest]]:
        """Requests for all attempts, one list a task."""
        return [
            [GenerationRequest(task.tokens, seed_of(place, sample)) for sample in range(self._samples)]
            for place, task in enumerate(self._tasks)
        ]

    def arrived(self, responses: list[tuple[int, Response]]) -> None:
        """Keep responses with their positions, and hand each on with its text."""
        texts = self._decode([response.segment.tokens.tolist() for _, response in responses])
        for (position, response), text in zip(responses, texts, strict=True):
            place, sample = divmod(position, self._samples)
            segments = (response.segment.copied(),)
            trajectory = Trajectory(self._tasks[place], sample, segments, response.finish_reason, text)
            self._found[position] = trajectory
            self._take(position, trajectory)

    def all(self) -> list[Trajectory]:
        """Every trajectory, in the order of positions."""
        found = [trajectory for trajectory in self._found if trajectory is not None]
        assert len(found) == len(self._found), "every response must have come"
        return found
