"""Rewards of the trajectories of a step.

reward = verifier + sum over reward.added of weight * its reward + overlong_weight * soft overlong punishment
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from megatron_entropic.config.names import PROMPT, verifier_entry
from megatron_entropic.config.plugins import find_attribute
from megatron_entropic.config.run import RewardConfig
from megatron_entropic.errors import Problems
from megatron_entropic.rewards.judge import Judge, Judging
from megatron_entropic.rewards.verifier import Job, Trial, trial_settings, trials
from megatron_entropic.types import Reward, Trajectory, Verdict


class RewardScorer:
    """Judges trajectories with the configured verifier and added rewards; a context manager, or call `close`."""

    def __init__(self, config: RewardConfig, *, max_response_tokens: int | None = None):
        """Load the verifiers, in their processes if they get some.

        Args:
            config: the verifiers, their weights and limits.
            max_response_tokens: longest response there can be; needed by `reward.overlong_buffer_tokens`.

        Raises:
            ValueError: a verifier does not exist or does not import.
            RunError: a verifier process did not start.
        """
        self._config, self._max_response_tokens = config, max_response_tokens
        with ExitStack() as judges:
            self._main = self._judge_of(config.verifier, judges)
            self._added = [self._judge_of(name, judges) for name in config.added]
            self._judges = judges.pop_all()

    def scoring(self, groups: int, group_size: int) -> Scoring:
        """Begin to judge the trajectories of some groups, which may come later."""
        judgings = {judge.name: judge.judging(groups * group_size) for judge in (self._main, *self._added)}
        return Scoring(self._config, judgings, group_size, self._max_response_tokens)

    def judging(self, count: int) -> Judging:
        """Begin to judge `count` jobs by the verifier alone."""
        return self._main.judging(count)

    def truth_problems(self, truths: Sequence[Any]) -> list[str | None]:
        """Words for why the verifier cannot use a ground truth, None where it can; see `verifier.trials`."""
        reasons: list[str | None] = [None] * len(truths)
        asked: list[tuple[int, Trial, Job]] = []
        settings, alone = trial_settings(self._main.name, self._config)
        for position, truth in enumerate(truths):
            try:
                found = trials(self._main.name, truth)
            except ValueError as error:
                reasons[position] = str(error)
                continue
            asked += [(position, trial, (alone(trial.answer), truth, {})) for trial in found]
        with ExitStack() as closing:
            judge = self._main if settings is self._config else self._judge_of(self._main.name, closing, settings)
            verdicts = judge.verdicts([job for *_, job in asked])
        for (position, trial, _), verdict in zip(asked, verdicts, strict=True):
            reasons[position] = reasons[position] or trial.objection(verdict)
        return reasons

    def check_usable(self) -> None:
        """Ask once whether what verifiers depend on answers.

        Raises:
            UserError: something does not, with all reasons.
        """
        problems = Problems()
        for judge in (self._main, *self._added):
            if (probe := verifier_entry(judge.name).probe) is not None:
                asked = find_attribute("verifier", probe, arguments=1)
                problems.attempt(partial(asked, self._config))
        problems.raise_if_any("verifiers cannot be used:")

    def close(self) -> None:
        """End the verifier processes."""
        self._judges.close()

    def __enter__(self) -> RewardScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _judge_of(self, name: str, judges: ExitStack, settings: RewardConfig | None = None) -> Judge:
        judge = Judge(settings or self._config, name)
        judges.callback(judge.close)
        return judge


class Scoring:
    """Trajectories that come in any order and are judged meanwhile, by every verifier; a context manager."""

    def __init__(
        self, config: RewardConfig, judgings: dict[str, Judging], group_size: int, max_response_tokens: int | None
    ):
        """Expect trajectories at the positions 0, 1, ...; the first of `judgings` decides what is correct."""
        self._config, self._max_response_tokens = config, max_response_tokens
        self._judgings, self._group_size = judgings, group_size
        self._overlong: dict[int, float] = {}

    def add(self, position: int, trajectory: Trajectory) -> None:
        """Take one trajectory; those at the positions of a group are attempts at one task."""
        self._overlong[position] = self._overlong_penalty(trajectory)
        main, *added = self._judgings.values()
        judge_trajectory(main, position, trajectory)
        known = trajectory.verdict
        unverdicted = trajectory if known is None or known.status != "ok" else replace(trajectory, verdict=None)
        for judging in added:
            judge_trajectory(judging, position, unverdicted)

    @property
    def ready(self) -> bool:
        """Whether all trajectories have come and are judged, so that `finish` need not wait."""
        return all(judging.ready for judging in self._judgings.values())

    def finish(self) -> tuple[list[Reward], dict[str, float]]:
        """Wait for the last verdicts; returns the rewards in the order of positions, and metrics.

        All trajectories have come. One of which a verifier failed gets the mean reward of the others of its group (0 if
        there are none): a group-relative advantage is then 0 for it, and it pushes the policy nowhere.

        Returns:
            Metrics are reward/verifier_errors and _timeouts (responses); with several rewards the mean of each before
            weighting, reward/verifier_mean, reward/NAME_mean, reward/overlong_mean; what verifiers measured of their
            own, such as judge/cache_hits.
        """
        verdicts = [judging.verdicts(warn=True) for judging in self._judgings.values()]
        overlong = [self._overlong[position] for position in range(len(self._overlong))]
        rewards = [self._reward(of_one, penalty) for *of_one, penalty in zip(*verdicts, overlong, strict=True)]
        starts = range(0, len(rewards), self._group_size)
        rewards = [one for start in starts for one in _without_failures(rewards[start : start + self._group_size])]
        statuses = Counter(reward.status for reward in rewards)
        return rewards, {
            "reward/verifier_errors": float(statuses["error"]),
            "reward/verifier_timeouts": float(statuses["timeout"]),
            **self._parts(verdicts, overlong),
            **_measured([verdict for of_one in verdicts for verdict in of_one]),
        }

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        for judging in self._judgings.values():
            judging.cancel()

    def _reward(self, verdicts: Sequence[Verdict], overlong: float) -> Reward:
        main, *added = verdicts
        weighted = (weight * one.reward for weight, one in zip(self._config.added.values(), added, strict=True))
        return Reward(
            value=main.reward + sum(weighted) + self._config.overlong_weight * overlong,
            verifier=main.reward,
            status=next((one.status for one in verdicts if one.status != "ok"), "ok"),
        )

    def _overlong_penalty(self, trajectory: Trajectory) -> float:
        buffer = self._config.overlong_buffer_tokens
        if not buffer:
            return 0.0
        assert self._max_response_tokens is not None, "reward.overlong_buffer_tokens needs the longest response"
        return overlong_penalty(trajectory.continuation_length, self._max_response_tokens, buffer)

    def _parts(self, verdicts: Sequence[list[Verdict]], overlong: list[float]) -> dict[str, float]:
        """Means of the single rewards, where there are several."""
        parts: dict[str, float] = {}
        if self._config.overlong_buffer_tokens:
            parts["reward/overlong_mean"] = fmean(overlong)
        if len(verdicts) > 1:
            names = ["verifier", *(name.rpartition(":")[2] for name in list(self._judgings)[1:])]
            for name, of_one in zip(names, verdicts, strict=True):
                parts[f"reward/{name}_mean"] = fmean(verdict.reward for verdict in of_one)
        return parts


def judge_trajectory(judging: Judging, position: int, trajectory: Trajectory) -> None:
    """Let a trajectory be judged, unless its environment has a verdict already."""
    if trajectory.verdict is not None:
        judging.settle(position, trajectory.verdict)
    else:
        judging.add(position, job_of(trajectory, with_prompt=judging.reads_prompt))


def job_of(trajectory: Trajectory, *, with_prompt: bool = False) -> Job:
    """Response, ground truth and extra_info of a trajectory, as a verifier gets them; with the prompt's text or not."""
    task = trajectory.task
    extra_info = {**task.extra_info, PROMPT: task.text} if with_prompt else task.extra_info
    return trajectory.text, task.ground_truth, extra_info


def _measured(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Sums of the verifiers' own measures, means of those whose names end in _mean."""
    found: dict[str, list[float]] = {}
    for verdict in verdicts:
        for name, value in verdict.measures.items():
            found.setdefault(name, []).append(value)
    return {name: fmean(values) if name.endswith("_mean") else float(sum(values)) for name, values in found.items()}


def _without_failures(group: list[Reward]) -> list[Reward]:
    judged = [reward.value for reward in group if reward.status == "ok"]
    mean = fmean(judged) if judged else 0.0
    return [reward if reward.status == "ok" else replace(reward, value=mean) for reward in group]


# Soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).


def overlong_penalty(response_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """Soft overlong punishment: 0 up to `max_tokens` - `buffer_tokens`, then linearly down to -1 at `max_tokens`.

    Args:
        response_tokens: length of the response.
        max_tokens: L_max, the longest response there can be.
        buffer_tokens: L_cache, at least 1.
    """
    beyond = response_tokens - (max_tokens - buffer_tokens)
    return -min(max(beyond, 0) / buffer_tokens, 1.0)
