"""EntroPIC and its surroundings as pure functions of tensors; torch only, usable from any trainer."""

from megatron_entropic.algorithms.advantages import advantages
from megatron_entropic.algorithms.aggregation import high_prob_token_weights, token_weights
from megatron_entropic.algorithms.distillation import distilled
from megatron_entropic.algorithms.entropy_control import (
    Controller,
    EntropyController,
    Guard,
    MicrobatchLocalController,
    PromptAlpha,
    Steering,
    build_controller,
)
from megatron_entropic.algorithms.importance import (
    corrections,
    importance_metrics,
    importance_ratios,
    importance_weights,
    mismatch_metrics,
    mismatch_metrics_of,
)
from megatron_entropic.algorithms.losses import POLICY_LOSSES, PolicyLoss, find_policy_loss
from megatron_entropic.algorithms.losses.policy_loss import PolicyLossTerms, entropic_term, kl_penalty, policy_loss

__all__ = [
    "POLICY_LOSSES",
    "Controller",
    "EntropyController",
    "Guard",
    "MicrobatchLocalController",
    "PolicyLoss",
    "PolicyLossTerms",
    "PromptAlpha",
    "Steering",
    "advantages",
    "build_controller",
    "corrections",
    "distilled",
    "entropic_term",
    "find_policy_loss",
    "high_prob_token_weights",
    "importance_metrics",
    "importance_ratios",
    "importance_weights",
    "kl_penalty",
    "mismatch_metrics",
    "mismatch_metrics_of",
    "policy_loss",
    "token_weights",
]
