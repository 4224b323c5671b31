"""Verifiers, which judge responses. A verifier that fails or hangs is counted, and is not a wrong answer.

Imports neither torch nor anything heavy: verifier processes start from this package.
"""

from megatron_entropic.rewards.scorer import RewardScorer, judge_trajectory
from megatron_entropic.rewards.verifier import Verifier, build_reader, build_verifier

__all__ = ["RewardScorer", "Verifier", "build_reader", "build_verifier", "judge_trajectory"]
