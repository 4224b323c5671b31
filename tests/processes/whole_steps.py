"""A scorer's judgement of samples that are all there, as tests have them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_entropic.rewards.scorer import RewardScorer, judge_trajectory
from megatron_entropic.types import Reward, Trajectory, Verdict


def judge(
    scorer: RewardScorer, trajectories: Sequence[Trajectory], *, group_size: int = 1
) -> tuple[list[Reward], dict[str, float]]:
    """The rewards of all trajectories, and the metrics of the step."""
    with scorer.scoring(len(trajectories) // group_size, group_size) as scoring:
        for position, trajectory in enumerate(trajectories):
            scoring.add(position, trajectory)
        return scoring.finish()


def verdicts(scorer: RewardScorer, trajectories: Sequence[Trajectory]) -> list[Verdict]:
    """What the verifier alone says, failures as such."""
    judging = scorer.judging(len(trajectories))
    for position, trajectory in enumerate(trajectories):
        judge_trajectory(judging, position, trajectory)
    return judging.verdicts()
