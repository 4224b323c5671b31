"""A scorer's judgement of samples that are all there, as tests have them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_entropic.rewards.scorer import RewardScorer, job_of
from megatron_entropic.rewards.verifier import Verdict
from megatron_entropic.types import Sample


def judge(scorer: RewardScorer, samples: Sequence[Sample]) -> dict[str, float]:
    """Set the rewards of all samples; the metrics of the step."""
    with scorer.scoring(len(samples)) as scoring:
        for position, sample in enumerate(samples):
            scoring.add(position, sample)
        return scoring.finish()


def verdicts(scorer: RewardScorer, samples: Sequence[Sample]) -> list[Verdict]:
    """What the verifier alone says, failures as such; no sample is changed."""
    judging = scorer.judging(len(samples))
    for position, sample in enumerate(samples):
        judging.add(position, job_of(sample))
    return judging.verdicts()
