"""Rollouts that run ahead: engines work on the steps k .. k + lag while the policy learns step k.

    publishing(k - 1) --asks the tasks of step k + lag--> dispatcher --parts of attempts--> judged as they end
                                                                                            |
    trainer <-------------------------- of_step(k), when all groups of step k are judged <--+

Admission is the only thing that the lag bounds. Step k trains on exactly the tasks of step k, in their order, and
nothing that was sampled is thrown away; a token of it is at most `rollout.lag` versions older than the policy.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType

import numpy as np
import torch

from megatron_entropic.cluster.cluster import Cluster
from megatron_entropic.cluster.dispatch import Ask, Dispatcher
from megatron_entropic.cluster.policy_group import PolicyGroup
from megatron_entropic.cluster.sampling import DealtOut, Queued, Sampler
from megatron_entropic.config.run import Config
from megatron_entropic.data import TaskDataset
from megatron_entropic.data.tokenizer import Tokenizer
from megatron_entropic.errors import RunError
from megatron_entropic.rewards import RewardScorer
from megatron_entropic.rewards.scorer import Scoring
from megatron_entropic.rollout.schedule import Moment
from megatron_entropic.training.in_flight import SavedAttempt
from megatron_entropic.training.journal import Journal
from megatron_entropic.training.lifecycle import StopRequest
from megatron_entropic.training.preconditions import Inputs
from megatron_entropic.training.rollouts import JudgedRollouts, Rollouts, Rounds, grouped
from megatron_entropic.training.run_directory import RunDirectory
from megatron_entropic.types import (
    CUT,
    GenerationRequest,
    Group,
    Response,
    Segment,
    Sequence,
    Task,
    Trajectory,
    derived_seed,
)


@dataclass(slots=True)
class _Attempt:
    """One attempt at a task, as far as it has come."""

    task: Task
    segments: list[Segment] = field(default_factory=list)
    finish_reason: str = ""
    trajectory: Trajectory | None = None
    """What was judged. Its segments may be scored later; those here are."""

    def up_to(self, number: int) -> Sequence:
        """Sequence whose response is the segment `number`, after all that comes before it."""
        before = [self.task.tokens, *(segment.tokens for segment in self.segments[:number])]
        tokens = np.concatenate([*before, self.segments[number].tokens])
        return Sequence(torch.from_numpy(tokens).long(), prompt_length=sum(part.size for part in before))


class RunAhead:
    """Source of judged groups, some steps of which are in flight at any time; a context manager."""

    def __init__(
        self,
        config: Config,
        tasks: TaskDataset,
        cluster: Cluster,
        dispatcher: Dispatcher,
        scorer: RewardScorer,
        journal: Journal,
        stop: StopRequest,
    ) -> None:
        """Prepare; nothing is asked for before `begin`."""
        self._config = config
        self._tasks = tasks
        self._cluster = cluster
        self._dispatcher = dispatcher
        self._scorer = scorer
        self._journal = journal
        self._stop = stop
        self._ahead: dict[int, _StepAhead] = {}
        self._splits = config.rollout.split_staleness
        self._measured_s = time.time()

    def begin(self, step: int, moment: Moment, saved: Iterable[SavedAttempt] = ()) -> None:
        """Ask for the steps after `step`, whose weights engines have.

        Args:
            step: number of the last step done.
            moment: moment with which the engines begin.
            saved: what was in flight when the checkpoint of `step` was written.
        """
        self._dispatcher.begin(moment)
        by_step: dict[int, list[SavedAttempt]] = {}
        lag = self._config.rollout.lag
        for attempt in saved:
            if any(attempt.step - 1 - one.weights_version > lag for one in attempt.segments):
                continue  # the lag was larger before
            by_step.setdefault(attempt.step, []).append(attempt)
        last = min(step + 1 + lag, self._config.train.steps)
        for number in range(step + 1, last + 1):
            self._open(number, by_step.get(number, []))

    def of_step(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """Wait for the groups of a step; returns them and the metrics reward/verifier_* and resampling/*."""
        ahead = self._ahead[step]
        raise_if_asked = self._stop.raise_if_asked
        with self._journal.phase("generate"), self._dispatcher.turn(raise_if_asked):
            self._dispatcher.wait(ahead.is_complete, phase=f"generate (step {step})", while_waiting=raise_if_asked)
        del self._ahead[step]
        ahead.close()
        groups, metrics = ahead.result()
        return groups, metrics | self._engine_metrics()

    def before_update(self, policy: PolicyGroup) -> None:
        """Let the policy keep its weights, from which engines go on to sample while it is updated.

        With `cluster.colocate` engines stand still, so that all those weights have sampled is there to be scored.
        """
        if self._splits and self._config.cluster.colocate:
            self._dispatcher.settle("score: what was in flight")
            self._score_sampled_by(self._dispatcher.version, policy)
        elif self._splits:
            policy.keep_weights()

    @contextmanager
    def publishing(self, step: int) -> Iterator[None]:
        """Let the weights of `step` come in the block; then ask for the tasks that they make room for.

        What the weights before have sampled for later steps is complete then, and scored with them.
        """
        self._dispatcher.before_swap(f"publish (weights version {step})")
        yield
        self._dispatcher.begin(Moment(step, 0, 0))
        following = step + 1 + self._config.rollout.lag
        if following <= self._config.train.steps:
            self._open(following, [])  # before anything else, so that no engine waits for it
        if self._splits and not self._config.cluster.colocate:
            self._dispatcher.settle(f"publish (weights version {step})")
            with self._cluster.training() as policy:
                self._score_sampled_by(step - 1, policy)

    def in_flight(self, step: int) -> tuple[Moment, list[SavedAttempt]]:
        """Cut what runs; returns all that is in flight beside the weights of `step`, and the moment it goes on with.

        Where engines cannot be cut any more, what was sampled before these weights came.
        """
        if self._config.rollout.schedule_of is not None:  # cuts come when the record says so
            return Moment(step, 0, 0), []
        try:
            with self._dispatcher.stopped(f"checkpoint (step {step})") as moment:
                return moment, self._saved(moment)
        except RunError:
            return Moment(step, 0, 0), self._saved(Moment(step, 0, 0))

    def _saved(self, before: Moment) -> list[SavedAttempt]:
        placed = self._dispatcher.placed(before)
        return [one for ahead in self._ahead.values() for one in ahead.saved(before, placed)]

    def __enter__(self) -> RunAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for ahead in self._ahead.values():
            ahead.close()

    def _engine_metrics(self) -> dict[str, float]:
        """Metrics rollout/* of the time since the last call, of which the engines' work goes into the timeline.

        rollout/busy_fraction   share of the time in which an engine worked, mean over engines
        rollout/in_flight       number of attempts that engines have
        rollout/waiting         number of attempts in the queue
        """
        now_s, timeline = time.time(), self._journal.timeline
        busy_s, waiting = 0.0, self._dispatcher.waiting
        unfinished: dict[str, int] = {}
        for name, report in self._dispatcher.take_reports():
            unfinished[name] = report.unfinished
            if report.passes:
                busy_s += report.ended_s - report.began_s
                details = {"passes": report.passes, "tokens": report.tokens, "version": report.moment.version}
                timeline.span(name, "generate", report.began_s, report.ended_s, **details)
            timeline.count(f"{name}: unfinished", report.ended_s, report.unfinished)
        timeline.count("waiting", now_s, waiting)
        passed_s, self._measured_s = now_s - self._measured_s, now_s
        self._dispatcher.pace(passed_s)
        return {
            "rollout/busy_fraction": busy_s / (passed_s * self._config.rollout.engines),
            "rollout/in_flight": float(sum(unfinished.values())),
            "rollout/waiting": float(waiting),
        }

    def _score_sampled_by(self, version: int, policy: PolicyGroup) -> None:
        """Score what a version has sampled, which the policy has kept or still has."""
        with self._dispatcher.standing():
            places = [place for ahead in self._ahead.values() for place in ahead.sampled_by(version)]
            sequences = [attempt.up_to(number) for attempt, number in places]
        if not sequences:
            return
        with self._journal.phase("score"):
            scores = policy.score_kept(sequences)
        with self._dispatcher.standing():
            for (attempt, number), logprobs in zip(places, scores.logprobs, strict=True):
                attempt.segments[number] = replace(attempt.segments[number], policy_logprobs=logprobs.numpy())

    def _open(self, step: int, saved: list[SavedAttempt]) -> None:
        rounds = Rounds(self._config.rollout, self._tasks, step)
        ahead = _StepAhead(step, rounds, self._config, self._dispatcher, self._scorer, self._tasks.tokenizer)
        self._ahead[step] = ahead
        ahead.begin({(one.place, one.sample): one for one in saved})


class _StepAhead:
    """The attempts of one step, round by round; parts of them arrive in the dispatcher's thread, under its lock."""

    def __init__(
        self,
        step: int,
        rounds: Rounds,
        config: Config,
        dispatcher: Dispatcher,
        scorer: RewardScorer,
        tokenizer: Tokenizer,
    ) -> None:
        self.rounds = rounds
        self._step = step
        self._config = config
        self._dispatcher = dispatcher
        self._scorer = scorer
        self._decode = partial(tokenizer.batch_decode, skip_special_tokens=True)
        self._attempts: dict[tuple[int, int], _Attempt] = {}
        self._saved: dict[tuple[int, int], SavedAttempt] = {}
        self._scoring: Scoring | None = None
        self._open_scorings = ExitStack()
        self._first_place = self._unfinished = 0

    def begin(self, saved: dict[tuple[int, int], SavedAttempt]) -> None:
        """Ask for the first round; attempts that were in flight, by place and sample, go on where they were."""
        self._saved = saved
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
        segments = {id(one.trajectory): tuple(one.segments) for one in self._attempts.values()}
        return [
            replace(group, trajectories=tuple(replace(one, segments=segments[id(one)]) for one in group.trajectories))
            for group in groups
        ], metrics

    def saved(self, before: Moment, placed: dict[tuple[str, int], tuple[int, int]]) -> list[SavedAttempt]:
        """Attempts as they were before `before`; `placed` has engine and ticket of those that an engine has."""
        found = []
        for (place, sample), attempt in self._attempts.items():
            kept = [one for one in attempt.segments if before.part or one.weights_version < before.version]
            engine, ticket = placed.get((f"{self._step}/{place}", sample), (-1, -1))
            if kept or engine >= 0:
                reason = attempt.finish_reason if len(kept) == len(attempt.segments) else ""
                index = attempt.task.index
                found.append(SavedAttempt(self._step, place, sample, index, tuple(kept), reason, engine, ticket))
        return found

    def sampled_by(self, version: int) -> list[tuple[_Attempt, int]]:
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
        self._scoring = self._open_scorings.enter_context(self._scorer.scoring(len(tasks), size))
        asks = [ask for place, task in enumerate(tasks, self._first_place) for ask in self._asks(place, task)]
        self._dispatcher.ask(asks)

    def _asks(self, place: int, task: Task) -> list[Ask]:
        """What is still to be sampled of a group: together, or each where it was in flight."""
        seed, rollout = self._config.run.seed, self._config.rollout
        group, arrived = f"{self._step}/{place}", partial(self._arrived, place)
        together: dict[int, GenerationRequest] = {}
        asks = []
        for sample in range(rollout.samples_per_prompt):
            attempt = self._attempts[place, sample] = _Attempt(task)
            request = GenerationRequest(task.tokens, derived_seed(seed, self._step, place, sample))
            was = self._saved.pop((place, sample), None)
            if was is not None:
                attempt.segments = list(was.segments)
                for segment in was.segments:
                    request = request.continued(segment.tokens)
            if was is not None and was.finish_reason:
                self._finish(place, sample, was.finish_reason)
            elif was is not None and was.engine >= 0:
                # In the order in which its engine had taken them up, before anything else.
                order, engine = (-2, was.ticket), f"engine {was.engine}"
                asks.append(Ask(group, order, {sample: request}, rollout.sampling, arrived, engine))
            else:
                together[sample] = request
        if together:
            asks.append(Ask(group, (self._step, place), together, rollout.sampling, arrived))
        return asks

    def _arrived(self, place: int, sample: int, response: Response) -> None:
        if response.segment.tokens.size:
            self._attempts[place, sample].segments.append(response.segment.copied())
        if response.finish_reason != CUT:
            self._finish(place, sample, response.finish_reason)
            self.is_complete()

    def _finish(self, place: int, sample: int, reason: str) -> None:
        attempt = self._attempts[place, sample]
        tokens = np.concatenate([segment.tokens for segment in attempt.segments])
        (text,) = self._decode([tokens.tolist()])
        attempt.finish_reason = reason
        attempt.trajectory = Trajectory(attempt.task, sample, tuple(attempt.segments), reason, text)
        assert self._scoring is not None, "a round is open"
        position = (place - self._first_place) * self._config.rollout.samples_per_prompt + sample
        self._scoring.add(position, attempt.trajectory)
        self._unfinished -= 1


@contextmanager
def open_rollouts(
    step: int, config: Config, cluster: Cluster, inputs: Inputs, run: RunDirectory, stop: StopRequest
) -> Iterator[tuple[Rollouts, Sampler]]:
    """Yields the source of the steps after `step`, whose weights engines have, and what answers benchmarks."""
    tokenizer, journal = inputs.tasks.tokenizer, run.journal
    if not config.rollout.lag:
        sampler = Sampler(config, DealtOut(cluster), tokenizer)
        yield JudgedRollouts(config.rollout, inputs.tasks, sampler, inputs.scorer, journal, stop), sampler
        return
    moment, saved = run.checkpoints.in_flight(step)
    with (
        Dispatcher(config, cluster) as dispatcher,
        RunAhead(config, inputs.tasks, cluster, dispatcher, inputs.scorer, journal, stop) as ahead,
    ):
        ahead.begin(step, moment, saved)
        yield ahead, Sampler(config, Queued(dispatcher), tokenizer)
