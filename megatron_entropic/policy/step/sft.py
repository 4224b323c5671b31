"""Supervised steps before reinforcement learning: maximum likelihood of responses, by the update's gradient step."""

from __future__ import annotations

import torch

from megatron_entropic.config.run import Config, OptimizerConfig
from megatron_entropic.policy.batch.microbatch import MicroBatch
from megatron_entropic.policy.model.outputs import HeadName, OutputOptions, TokenStatistics
from megatron_entropic.policy.step.gradient_step import GradientStep
from megatron_entropic.policy.step.loss import global_counts
from megatron_entropic.policy.step.optimizer import PolicyOptimizer
from megatron_entropic.tensor_parallel import TokenLoss
from megatron_entropic.types import Sequence


def warm_start_optimizer(config: Config) -> OptimizerConfig:
    """The `optimizer` section with the rate and warm-up of `warm_start` and a constant schedule."""
    return config.optimizer.model_copy(
        update={
            "learning_rate": config.warm_start.learning_rate,
            "warmup_steps": config.warm_start.warmup_steps,
            "min_learning_rate": 0.0,
            "schedule": "constant",
        }
    )


def warm_start_step(
    machinery: GradientStep, sequences: list[Sequence], optimizer: PolicyOptimizer, head: HeadName
) -> dict[str, float]:
    """Take one optimizer step on L = mean over all response tokens of all ranks of -log pi(token), at temperature 1.

    Args:
        machinery: gradient step of this rank.
        sequences: sequences of this replica.
        optimizer: optimizer that steps.
        head: output head by which the last stage turns hidden states into log-probs.

    Returns:
        loss/warm_start (nats per token), response/tokens, grad_norm, learning_rate, optimizer/skipped; equal on all
        ranks.
    """
    batch = machinery.align(sequences)
    counts = global_counts(sequences, machinery.parallel, machinery.device)

    def share(micro_batch: MicroBatch, statistics: TokenStatistics) -> tuple[torch.Tensor, torch.Tensor]:
        loss = -statistics.logprobs.sum() / counts.tokens
        return loss, loss.detach().to(torch.float64).reshape(1)

    def token_loss(_micro_batch: MicroBatch) -> TokenLoss:
        return lambda logprobs, _entropies, _tokens: -logprobs.sum() / counts.tokens

    options = OutputOptions(entropy=False, head=head, token_loss=token_loss)
    sums, outcome = machinery.run(batch, share, options, optimizer, width=1)
    return {
        "loss/warm_start": float(sums[0]),
        "response/tokens": counts.tokens,
        "grad_norm": outcome.gradient_norm,
        "learning_rate": optimizer.learning_rate,
        "optimizer/skipped": float(not outcome.stepped),
    }
