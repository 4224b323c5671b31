"""Rewards of the samples of a step."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_entropic.config import RewardConfig
from megatron_entropic.rewards.ground_truths import objection, own_answer
from megatron_entropic.rewards.pool import Job, VerifierPool
from megatron_entropic.rewards.verdict import Verdict, judge
from megatron_entropic.rewards.verifiers import INSTANT, build_verifier

if TYPE_CHECKING:
    from megatron_entropic.types import Sample

logger = logging.getLogger(__name__)


class RewardScorer:
    """Judges samples with the configured verifier; a context manager, or call `close`.

    `reward.workers` processes judge, each response within `reward.timeout_s`. With 0 workers, and for the verifiers
    that take no time, this process judges itself, without a time limit.
    """

    def __init__(self, config: RewardConfig):
        """Load the verifier, in its processes if it gets some.

        Raises:
            ValueError: the verifier does not exist or does not import.
            RunError: a verifier process did not start.
        """
        self._name = config.verifier
        self._pool: VerifierPool | None = None
        if config.workers == 0 or config.verifier in INSTANT:
            self._verifier = build_verifier(config.verifier)
        else:
            self._pool = VerifierPool(config)

    def judge(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Set `reward` and `verifier_status` of every sample; returns reward/verifier_errors and _timeouts (counts).

        A sample whose verifier failed gets the mean reward of the others to its prompt (0 if there are none): a
        group-relative advantage is then 0 for it, and it pushes the policy nowhere.

        Args:
            samples: grouped by prompt, sample_index ascending in each group.
        """
        verdicts = self.verdicts(samples)
        for sample, verdict in zip(samples, verdicts, strict=True):
            sample.reward, sample.verifier_status = verdict.reward, verdict.status
        for group in _groups(samples):
            _neutralise_failures(group)
        statuses = Counter(verdict.status for verdict in verdicts)
        return {
            "reward/verifier_errors": float(statuses["error"]),
            "reward/verifier_timeouts": float(statuses["timeout"]),
        }

    def verdicts(self, samples: Sequence[Sample]) -> list[Verdict]:
        """What the verifier says of each sample, failures as such; they are logged and change no sample."""
        jobs: list[Job] = [(sample.text, sample.prompt.ground_truth, sample.prompt.extra_info) for sample in samples]
        verdicts = self._judge(jobs)
        self._warn(verdicts)
        return verdicts

    def truth_problems(self, truths: Sequence[Any]) -> list[str | None]:
        """Why the verifier cannot use a ground truth, None where it can; see `ground_truths`."""
        reasons: list[str | None] = [None] * len(truths)
        jobs: dict[int, Job] = {}
        for position, truth in enumerate(truths):
            try:
                answer = own_answer(self._name, truth)
            except ValueError as error:
                reasons[position] = str(error)
                continue
            if answer is not None:
                jobs[position] = (answer, truth, {})
        for position, verdict in zip(jobs, self._judge(list(jobs.values())), strict=True):
            reasons[position] = objection(self._name, verdict)
        return reasons

    def close(self) -> None:
        """End the verifier processes."""
        if self._pool:
            self._pool.close()

    def __enter__(self) -> RewardScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _judge(self, jobs: Sequence[Job]) -> list[Verdict]:
        return self._pool.judge(jobs) if self._pool else [judge(self._verifier, *job) for job in jobs]

    def _warn(self, verdicts: Sequence[Verdict]) -> None:
        failed = [verdict for verdict in verdicts if verdict.status != "ok"]
        if failed:
            logger.warning(
                "verifier %s failed on %d of %d responses; the first: %s (%s)",
                self._name,
                len(failed),
                len(verdicts),
                failed[0].status,
                failed[0].message,
            )


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
