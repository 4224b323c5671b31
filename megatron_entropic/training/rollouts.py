"""The judged groups that a step trains on.

    tasks --> engines --> verifiers --> groups all alike? --> other tasks, at most rollout.max_resamples times

Verifiers judge a response soon after it is finished, while others are still being sampled: the phase `reward` is what
is then left to wait for.

Replacing groups whose responses are all right or all wrong is DAPO's dynamic sampling (arXiv 2503.14476): their
group-relative advantages are 0, so they would take part in the step without teaching anything.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from megatron_entropic.cluster.policy_group import PolicyGroup
from megatron_entropic.cluster.sampling import Sampler
from megatron_entropic.config.run import RolloutConfig
from megatron_entropic.data import TaskDataset
from megatron_entropic.rewards import RewardScorer
from megatron_entropic.rollout.schedule import Moment
from megatron_entropic.training.in_flight import SavedAttempt
from megatron_entropic.training.journal import Journal
from megatron_entropic.training.lifecycle import StopRequest
from megatron_entropic.types import Group, Reward, Task, Trajectory


class Rollouts(Protocol):
    """A source of judged groups, step by step."""

    def of_step(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """Judged groups of a step, in the order of its tasks, and the metrics reward/verifier_* and resampling/*."""

    def before_update(self, policy: PolicyGroup) -> None:
        """Take from the policy what only its weights as they are now can tell."""

    def publishing(self, step: int) -> AbstractContextManager[None]:
        """Let the weights of `step` come in the block, and go on with them after it."""

    def in_flight(self, step: int) -> tuple[Moment, list[SavedAttempt]]:
        """What a checkpoint of `step` has to keep of the steps after it, and the moment it goes on with."""


class Rounds:
    """The rounds of one step: its own tasks, then replacements of groups that are all alike.

    A function of (seed, step) and of the verdicts, like everything else: replacements come from an order of their own.
    A replacement takes the place of the group it replaces. What is still all alike after the last round stays.
    """

    def __init__(self, config: RolloutConfig, tasks: TaskDataset, step: int) -> None:
        self._config, self._tasks, self._step = config, tasks, step
        self._groups: list[Group] = []
        self._judged: list[Group] = []
        self._alike: list[int] = []
        self._of_rounds: list[tuple[int, dict[str, float]]] = []
        self._seen: set[int] = set()
        self._asked = 0

    def next_tasks(self) -> list[Task]:
        """Tasks of the next round, after all of the one before were judged; none when the step is complete."""
        rounds = len(self._of_rounds)
        if not rounds:
            tasks = self._tasks.at_step(self._step, self._config.prompts_per_step)
        elif rounds > self._config.max_resamples or not self._alike:
            return []
        else:
            tasks = self._tasks.replacements(self._step, rounds - 1, len(self._alike), self._seen)
        self._seen |= {task.index for task in tasks}
        return tasks

    @property
    def first_place(self) -> int:
        """Place of the first task of the coming round; places count on, so that no seed comes twice."""
        return self._asked

    def judged(self, groups: list[Group], metrics: dict[str, float]) -> None:
        """Take the groups of the round's tasks, in their order, and the metrics of judging them."""
        if not self._of_rounds:
            self._groups = list(groups)
        for place, group in zip(self._alike, groups, strict=False):
            self._groups[place] = group
        self._asked += len(groups)
        self._judged += groups
        self._of_rounds.append((len(groups), metrics))
        self._alike = [place for place, group in enumerate(self._groups) if group.alike]

    def result(self) -> tuple[list[Group], dict[str, float]]:
        """Groups of the step, and the metrics reward/verifier_* and resampling/*."""
        metrics = merged(self._of_rounds)
        if self._config.max_resamples:
            rewards = [reward for group in self._judged for reward in group.rewards]
            metrics |= {
                "resampling/rounds": float(len(self._of_rounds) - 1),
                "resampling/replaced_groups": float(len(self._judged) - len(self._groups)),
                "resampling/left_groups": float(len(self._alike)),
                "resampling/verifier_reward_mean": fmean(reward.verifier for reward in rewards),
            }
        return self._groups, metrics


@dataclass
class JudgedRollouts:
    """Generator and judge of the groups of a step; engines wait while the policy learns from them."""

    config: RolloutConfig
    tasks: TaskDataset
    sampler: Sampler
    scorer: RewardScorer
    journal: Journal
    stop: StopRequest

    def of_step(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """Generate and judge the groups of a step; returns them and the metrics reward/verifier_* and resampling/*."""
        rounds = Rounds(self.config, self.tasks, step)
        while tasks := rounds.next_tasks():
            rounds.judged(*self._answered(step, tasks, first_place=rounds.first_place))
        groups, metrics = rounds.result()
        environments = self.sampler.environments
        return groups, metrics | (environments.take_metrics() if environments is not None else {})

    def before_update(self, policy: PolicyGroup) -> None:
        """Nothing: all that these weights sampled has been scored."""

    def publishing(self, step: int) -> AbstractContextManager[None]:
        """Nothing is in flight that would have to go on."""
        return nullcontext()

    def in_flight(self, step: int) -> tuple[Moment, list[SavedAttempt]]:
        """Nothing; see `Rollouts`."""
        return Moment(step, 0, 0), []

    def _answered(self, step: int, tasks: list[Task], *, first_place: int) -> tuple[list[Group], dict[str, float]]:
        """Generate and judge one round of tasks; places count on from round to round, so that no seed comes twice."""
        size = self.config.samples_per_prompt
        with self.scorer.scoring(len(tasks), size) as scoring:
            with self.journal.phase("generate"):
                trajectories = self.sampler.generate(
                    tasks, step, scoring.add, first_place=first_place, while_waiting=self.stop.raise_if_asked
                )
            with self.journal.phase("reward"):
                rewards, metrics = scoring.finish()
        return grouped(trajectories, rewards, size), metrics


def grouped(trajectories: list[Trajectory], rewards: list[Reward], size: int) -> list[Group]:
    """Groups of `size` neighbouring trajectories with their rewards."""
    starts = range(0, len(trajectories), size)
    return [Group(tuple(trajectories[i : i + size]), tuple(rewards[i : i + size])) for i in starts]


def merged(rounds: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Metrics of all rounds, each a number of groups and their metrics: sums of counts, means over the groups.

    A round need not have all: what a judge measures is there only where it was asked.
    """
    found = {}
    for name in dict.fromkeys(name for _, metrics in rounds for name in metrics):
        values = [(groups, metrics[name]) for groups, metrics in rounds if name in metrics]
        total = sum(groups for groups, _ in values) if name.endswith("_mean") else 1
        found[name] = sum(value * (groups / total if name.endswith("_mean") else 1) for groups, value in values)
    return found
