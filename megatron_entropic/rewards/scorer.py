"""Rewards of the samples of a step.

reward = verifier + sum over reward.added of weight * its reward + overlong_weight * soft overlong punishment
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_entropic.config.run import RewardConfig
from megatron_entropic.rewards.judge import Judge, Judging
from megatron_entropic.rewards.verifier import Job, Trial, Verdict, trial_settings, trials

if TYPE_CHECKING:
    from megatron_entropic.types import Sample


class RewardScorer:
    """Judges samples with the configured verifier and added rewards; a context manager, or call `close`."""

    def __init__(self, config: RewardConfig, *, max_response_tokens: int | None = None):
        """Load the verifiers, in their processes if they get some.

        Args:
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

    def scoring(self, count: int) -> Scoring:
        """Begin to judge `count` samples, which need not be there yet."""
        return Scoring(self._config, [self._main, *self._added], count, self._max_response_tokens)

    def judging(self, count: int) -> Judging:
        """The same by the verifier alone, which changes no sample."""
        return self._main.judging(count)

    def truth_problems(self, truths: Sequence[Any]) -> list[str | None]:
        """Why the verifier cannot use a ground truth, None where it can; see `verifier.trials`."""
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

    def close(self) -> None:
        """End the verifier processes."""
        self._judges.close()

    def __enter__(self) -> RewardScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _judge_of(self, name: str, judges: ExitStack, settings: RewardConfig | None = None) -> Judge:
        judge = Judge(settings or self._config, name)
        judges.callback(judge.close)
        return judge


class Scoring:
    """Samples that come in any order and are judged meanwhile, by every verifier; a context manager."""

    def __init__(self, config: RewardConfig, judges: Sequence[Judge], count: int, max_response_tokens: int | None):
        """Expect samples at the positions 0, ..., count - 1; the first judge decides what is correct."""
        self._config, self._max_response_tokens = config, max_response_tokens
        self._samples: list[Sample | None] = [None] * count
        self._judgings = {judge.name: judge.judging(count) for judge in judges}
        self._main = judges[0].name

    def add(self, position: int, sample: Sample) -> None:
        """Take one sample with its text."""
        self._samples[position] = sample
        for judging in self._judgings.values():
            judging.add(position, job_of(sample))

    def finish(self) -> dict[str, float]:
        """Wait for the last verdicts and set `reward`, `verifier_reward` and `verifier_status` of every sample.

        All samples have come, those at neighbouring positions being the groups of a prompt, with sample_index ascending
        in each. A sample of which a verifier failed gets the mean reward of the others to its prompt (0 if there are
        none): a group-relative advantage is then 0 for it, and it pushes the policy nowhere.

        Returns:
            reward/verifier_errors and _timeouts (responses); with several rewards the mean of each before weighting,
            reward/verifier_mean, reward/NAME_mean, reward/overlong_mean.
        """
        samples = [sample for sample in self._samples if sample is not None]
        verdicts = {name: judging.verdicts(warn=True) for name, judging in self._judgings.items()}
        overlong = [self._overlong(sample) for sample in samples]
        for position, sample in enumerate(samples):
            main, *added = (of_one[position] for of_one in verdicts.values())
            weighted = (weight * one.reward for weight, one in zip(self._config.added.values(), added, strict=True))
            sample.reward = main.reward + sum(weighted) + self._config.overlong_weight * overlong[position]
            sample.verifier_reward = main.reward
            sample.verifier_status = next((one.status for one in (main, *added) if one.status != "ok"), "ok")
        for group in _groups(samples):
            _neutralise_failures(group)
        statuses = Counter(sample.verifier_status for sample in samples)
        return {
            "reward/verifier_errors": float(statuses["error"]),
            "reward/verifier_timeouts": float(statuses["timeout"]),
            **self._parts(verdicts, overlong),
        }

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for judging in self._judgings.values():
            judging.cancel()

    def _overlong(self, sample: Sample) -> float:
        buffer = self._config.overlong_buffer_tokens
        if not buffer:
            return 0.0
        assert self._max_response_tokens is not None, "reward.overlong_buffer_tokens needs the longest response"
        return overlong_penalty(len(sample.response_tokens), self._max_response_tokens, buffer)

    def _parts(self, verdicts: dict[str, list[Verdict]], overlong: list[float]) -> dict[str, float]:
        """Means of the single rewards, where there are several."""
        parts: dict[str, float] = {}
        if self._config.overlong_buffer_tokens:
            parts["reward/overlong_mean"] = fmean(overlong)
        if len(verdicts) > 1:
            for name, of_one in verdicts.items():
                short = "verifier" if name == self._main else name.rpartition(":")[2]
                parts[f"reward/{short}_mean"] = fmean(verdict.reward for verdict in of_one)
        return parts


def job_of(sample: Sample) -> Job:
    """What a verifier gets of a sample that has its text."""
    return sample.text, sample.prompt.ground_truth, sample.prompt.extra_info


def _groups(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """The samples of each prompt. A prompt that comes twice in a row is two groups: its sample_index starts anew."""
    group: list[Sample] = []
    for sample in samples:
        if group and (sample.prompt.index != group[-1].prompt.index or sample.sample_index <= group[-1].sample_index):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _neutralise_failures(group: list[Sample]) -> None:
    rewards = [sample.reward for sample in group if sample.verifier_status == "ok" and sample.reward is not None]
    for sample in group:
        if sample.verifier_status != "ok":
            sample.reward = fmean(rewards) if rewards else 0.0


# Soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).


def overlong_penalty(response_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """0 up to `max_tokens` - `buffer_tokens`, from there linearly down to -1 at `max_tokens`, never below.

    Args:
        response_tokens: length of the response.
        max_tokens: L_max, the longest response there can be.
        buffer_tokens: L_cache, at least 1.
    """
    beyond = response_tokens - (max_tokens - buffer_tokens)
    return -min(max(beyond, 0) / buffer_tokens, 1.0)
