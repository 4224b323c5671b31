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
from contextlib import contextmanager
from dataclasses import replace

from megatron_entropic.cluster.cluster import Cluster
from megatron_entropic.cluster.dispatch import Dispatcher
from megatron_entropic.cluster.policy_group import PolicyGroup
from megatron_entropic.cluster.sampling import DealtOut, Queued, Sampler
from megatron_entropic.config.run import Config
from megatron_entropic.data import TaskDataset
from megatron_entropic.environments.record import recorded_environments
from megatron_entropic.errors import RunError
from megatron_entropic.rollout.schedule import Moment
from megatron_entropic.training.in_flight import SavedAttempt
from megatron_entropic.training.journal import Journal
from megatron_entropic.training.lifecycle import StopRequest
from megatron_entropic.training.preconditions import Inputs
from megatron_entropic.training.rollouts import JudgedRollouts, Rollouts, Rounds
from megatron_entropic.training.run_directory import RunDirectory
from megatron_entropic.training.step_ahead import Judges, StepAhead
from megatron_entropic.types import Group, Origin


class RunAhead:
    """Source of judged groups, some steps of which are in flight at any time; a context manager."""

    def __init__(
        self,
        config: Config,
        tasks: TaskDataset,
        dispatcher: Dispatcher,
        judges: Judges,
        journal: Journal,
        stop: StopRequest,
    ) -> None:
        """Prepare; nothing is asked for before `begin`."""
        self._config = config
        self._tasks = tasks
        self._dispatcher = dispatcher
        self._judges = judges
        self._journal = journal
        self._stop = stop
        self._ahead: dict[int, StepAhead] = {}
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
            written = [segment for segment in attempt.segments if segment.origin is Origin.POLICY]
            if any(attempt.step - 1 - segment.weights_version > lag for segment in written):
                continue  # the lag was larger before
            by_step.setdefault(attempt.step, []).append(attempt)
        last = min(step + 1 + lag, self._config.train.steps)
        for number in range(step + 1, last + 1):
            self._open(number, by_step.get(number, []))

    def of_step(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """Wait for the groups of a step; returns them and the metrics reward/verifier_* and resampling/*."""
        ahead = self._ahead[step]
        with self._journal.phase("generate"), self._dispatcher.turn(self._stop.raise_if_asked):
            self._dispatcher.wait(ahead.is_complete, phase=f"generate (step {step})", while_waiting=self._look)
        del self._ahead[step]
        ahead.close()
        groups, metrics = ahead.result()
        environments = self._judges.environments
        spoken = environments.take_metrics() if environments is not None else {}
        return groups, metrics | self._engine_metrics() | spoken

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
            with self._dispatcher.cluster.training() as policy:
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

    def __exit__(self, *_: object) -> None:
        for ahead in self._ahead.values():
            ahead.close()

    def _look(self) -> None:
        self._stop.raise_if_asked()
        self._judges.check()

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
        ahead = StepAhead(step, rounds, self._config, self._dispatcher, self._judges, self._tasks.tokenizer)
        self._ahead[step] = ahead
        ahead.begin({(one.place, one.sample): one for one in saved})


@contextmanager
def open_rollouts(
    step: int, config: Config, cluster: Cluster, inputs: Inputs, run: RunDirectory, stop: StopRequest
) -> Iterator[tuple[Rollouts, Sampler]]:
    """Yields the source of the steps after `step`, whose weights engines have, and what answers benchmarks."""
    tokenizer, journal = inputs.tasks.tokenizer, run.journal
    with recorded_environments(inputs.environments, run.path, config.rollout.schedule_of) as environments:
        if not config.rollout.lag:
            sampler = Sampler(config, DealtOut(cluster), tokenizer, environments)
            yield JudgedRollouts(config.rollout, inputs.tasks, sampler, inputs.scorer, journal, stop), sampler
            return
        moment, saved = run.checkpoints.in_flight(step)
        judges = Judges(inputs.scorer, environments)
        with (
            Dispatcher(config, cluster) as dispatcher,
            RunAhead(config, inputs.tasks, dispatcher, judges, journal, stop) as ahead,
        ):
            ahead.begin(step, moment, saved)
            yield ahead, Sampler(config, Queued(dispatcher), tokenizer, environments)
