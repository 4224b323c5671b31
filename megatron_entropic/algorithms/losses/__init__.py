"""Policy losses as small pure functions, selectable by `algorithm.policy_loss`; see docs/adding_an_algorithm.md."""

from megatron_entropic.algorithms.losses.interface import Across, BatchTokens, LossInputs, PolicyLoss
from megatron_entropic.algorithms.losses.registry import POLICY_LOSSES, find_policy_loss

__all__ = ["POLICY_LOSSES", "Across", "BatchTokens", "LossInputs", "PolicyLoss", "find_policy_loss"]
