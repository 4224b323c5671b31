"""EntroPIC and its surroundings as pure functions of tensors; torch only, usable from any trainer."""

from megatron_entropic.algorithms.advantages import advantages
from megatron_entropic.algorithms.aggregation import high_prob_token_weights, token_weights
from megatron_entropic.algorithms.entropy_control import EntropyController, MicrobatchLocalController
from megatron_entropic.algorithms.importance_correction import truncated_importance_weights
from megatron_entropic.algorithms.kl import kl_penalty
from megatron_entropic.algorithms.mismatch import mismatch_metrics
from megatron_entropic.algorithms.policy_loss import PolicyLossTerms, entropic_term, policy_loss

__all__ = [
    "EntropyController",
    "MicrobatchLocalController",
    "PolicyLossTerms",
    "advantages",
    "entropic_term",
    "high_prob_token_weights",
    "kl_penalty",
    "mismatch_metrics",
    "policy_loss",
    "token_weights",
    "truncated_importance_weights",
]
