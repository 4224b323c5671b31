"""The judged groups that a step trains on.

    tasks --> engines --> verifiers --> groups all alike? --> other tasks, at most rollout.max_resamples times

Verifiers judge a response soon after it is finished, while others are still being sampled: the phase `reward` is what
is then left to wait for.

Replacing groups whose responses are all right or all wrong is DAPO's dynamic sampling (arXiv 2503.14476): their
group-relative advantages are 0, so they would take part in the step without teaching anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from megatron_entropic.cluster.sampling import Sampler
from megatron_entropic.config.run import RolloutConfig
from megatron_entropic.data import TaskDataset
from megatron_entropic.rewards import RewardScorer
from megatron_entropic.training.journal import Journal
from megatron_entropic.training.lifecycle import StopRequest
from megatron_entropic.types import Group, Task


@dataclass
class JudgedRollouts:
    """Generator and judge of the groups of a step, which counts what it did."""

    config: RolloutConfig
    tasks: TaskDataset
    sampler: Sampler
    scorer: RewardScorer
    journal: Journal
    stop: StopRequest

    def of_step(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """Generate and judge the groups of a step; returns them and the metrics reward/verifier_* and resampling/*.

        A function of (seed, step) and the weights, like everything else: replacements come from an order of their own.
        A replacement takes the place of the group it replaces. What is still all alike after the last round stays.
        """
        asked = self.tasks.at_step(step, self.config.prompts_per_step)
        groups, metrics = self._answered(step, asked, first_place=0)
        judged, of_rounds = list(groups), [(len(groups), metrics)]
        seen = {task.index for task in asked}
        replaced = 0
        while len(of_rounds) <= self.config.max_resamples and (
            alike := [i for i, one in enumerate(groups) if one.alike]
        ):
            fresh = self.tasks.replacements(step, len(of_rounds) - 1, len(alike), seen)
            if not fresh:
                break
            answered, metrics = self._answered(step, fresh, first_place=len(asked) + replaced)
            of_rounds.append((len(answered), metrics))
            judged += answered
            replaced += len(fresh)
            seen |= {task.index for task in fresh}
            for place, group in zip(alike, answered, strict=False):
                groups[place] = group
        merged = _merged(of_rounds)
        if self.config.max_resamples:
            merged |= {
                "resampling/rounds": float(len(of_rounds) - 1),
                "resampling/replaced_groups": float(replaced),
                "resampling/left_groups": float(sum(group.alike for group in groups)),
                "resampling/verifier_reward_mean": fmean(one.verifier for group in judged for one in group.rewards),
            }
        return groups, merged

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
        starts = range(0, len(trajectories), size)
        groups = [Group(tuple(trajectories[i : i + size]), tuple(rewards[i : i + size])) for i in starts]
        return groups, metrics


def _merged(rounds: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Metrics of all rounds together: sums of counts, means over all their groups."""
    judged = sum(groups for groups, _ in rounds)
    return {
        name: sum(metrics[name] * (groups / judged if name.endswith("_mean") else 1) for groups, metrics in rounds)
        for name in rounds[0][1]
    }
