"""What a step learns from its judged samples: the score pass, then the optimizer steps.

The trainer does it with all ranks, `replay` with one rank in its own process.
"""

from __future__ import annotations

from typing import Protocol

from megatron_entropic.config.run import Config
from megatron_entropic.training.training_batch import (
    attach_reference,
    attach_scores,
    entropy_profile,
    importance,
    mean_of,
    minibatches,
    mismatch,
)
from megatron_entropic.types import Sample, Scores, Sequence


class Learner(Protocol):
    """The policy, wherever its ranks are."""

    def score(self, sequences: list[Sequence], *, reference: bool = False) -> Scores:
        """Log-probs and entropies of the response tokens under the current (or the reference) weights."""

    def update(self, minibatch: list[Sequence]) -> dict[str, float]:
        """One optimizer step; returns its metrics."""


def score_batch(
    policy: Learner, samples: list[Sample], batch: list[Sequence], config: Config
) -> tuple[Scores, dict[str, float]]:
    """Put old and reference log-probs on the sequences of `batch`; returns the scores and what they say of the batch.

    Args:
        policy: before the step's first update.
        samples: judged.
        batch: their sequences, in the same order.
        config: of the run.
    """
    if config.algorithm.kl.coefficient:
        attach_reference(batch, policy.score(batch, reference=True))
    scores = policy.score(batch)
    attach_scores(batch, scores)
    return scores, {**entropy_profile(samples, scores), **mismatch(batch), **importance(batch, config)}


def update_policy(policy: Learner, batch: list[Sequence], config: Config, step: int) -> dict[str, float]:
    """All optimizer steps of rollout step `step`; returns their metrics, see `mean_of`."""
    updates = []
    for epoch in range(config.algorithm.epochs_per_rollout):
        if epoch and config.algorithm.proximal_logprobs == "each_epoch":
            attach_scores(batch, policy.score(batch))
        updates += [policy.update(minibatch) for minibatch in minibatches(batch, config, step, epoch)]
    return mean_of(updates)
