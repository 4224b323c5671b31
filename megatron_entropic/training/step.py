"""What a step learns from its judged samples: the score pass, then the optimizer steps.

The trainer does it with all ranks, `replay` with one rank in its own process.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain
from statistics import fmean
from typing import Any, Protocol

import torch

from megatron_entropic.algorithms import advantages, importance_metrics, importance_ratios, mismatch_metrics
from megatron_entropic.config.run import Config
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


# From judged samples to what the policy trains on, and the statistics of a rollout.


def on_arrival(tokenizer: Any, take: Callable[[int, Sample], None]) -> Callable[[list[tuple[int, Sample]]], None]:
    """What to do with responses as they come: give each its text, for verifiers and people, and let `take` have it.

    Special tokens are left out of the text.
    """

    def arrived(responses: list[tuple[int, Sample]]) -> None:
        texts = tokenizer.batch_decode([s.response_tokens for _, s in responses], skip_special_tokens=True)
        for (position, sample), text in zip(responses, texts, strict=True):
            sample.text = text
            take(position, sample)

    return arrived


def training_batch(samples: list[Sample], config: Config) -> list[Sequence]:
    """One `Sequence` for each sample, in order; the advantage of a response holds for each of its tokens.

    Args:
        samples: judged, grouped by prompt, `rollout.samples_per_prompt` of each.
    """
    per_prompt = config.rollout.samples_per_prompt
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float32).view(-1, per_prompt)
    values = advantages(config.algorithm.advantage, rewards).flatten()
    return [_sequence(sample, value) for sample, value in zip(samples, values, strict=True)]


def minibatches(batch: list[Sequence], config: Config, step: int, epoch: int) -> list[list[Sequence]]:
    """Split a rollout into equal parts of whole prompt groups, one for each optimizer step of an epoch.

    Args:
        step, epoch: of the rollout, and from 0 within it. The first epoch keeps the order of the batch; the order of
            groups in later ones is a function of (seed, step, epoch).
    """
    per_prompt, parts = config.rollout.samples_per_prompt, config.algorithm.optimizer_steps_per_rollout
    groups = [batch[start : start + per_prompt] for start in range(0, len(batch), per_prompt)]
    if epoch:
        random.Random(f"{config.run.seed}/{step}/{epoch}").shuffle(groups)
    size = len(groups) // parts
    return [list(chain.from_iterable(groups[part * size : (part + 1) * size])) for part in range(parts)]


def attach_scores(batch: list[Sequence], scores: Scores) -> None:
    """Put the score pass's log-probs and the experts it chose on the sequences."""
    for index, sequence in enumerate(batch):
        sequence.old_logprobs = scores.logprobs[index]
        sequence.experts = scores.experts[index] if scores.experts else None


def attach_reference(batch: list[Sequence], scores: Scores) -> None:
    """Put the log-probs of the frozen reference on the sequences."""
    for sequence, logprobs in zip(batch, scores.logprobs, strict=True):
        sequence.reference_logprobs = logprobs


def prompt_groups(samples: list[Sample], per_prompt: int) -> list[list[Sample]]:
    """The responses to each prompt."""
    return [samples[start : start + per_prompt] for start in range(0, len(samples), per_prompt)]


def rollout_metrics(samples: list[Sample], config: Config) -> dict[str, float]:
    """reward/* and response/* of one rollout.

    solved_none and solved_all are the shares of prompts of which no or every response is correct: such groups teach
    nothing to a group-relative advantage of the verifier's reward.
    """
    per_prompt = config.rollout.samples_per_prompt
    rewards = [float(sample.reward or 0.0) for sample in samples]
    solved = [[sample.correct for sample in group] for group in prompt_groups(samples, per_prompt)]
    lengths = [len(sample.response_tokens) for sample in samples]
    return {
        "reward/mean": fmean(rewards),
        "reward/solved_none": fmean(not any(group) for group in solved),
        "reward/solved_all": fmean(all(group) for group in solved),
        "response/length_mean": fmean(lengths),
        "response/length_max": float(max(lengths)),
        "response/truncated_fraction": fmean(sample.finish_reason == "length" for sample in samples),
    }


def mismatch(batch: list[Sequence]) -> dict[str, float]:
    """How far the engines' log-probs are from the policy's own, before any update of this step."""
    policy = torch.cat([s.old_logprobs for s in batch if s.old_logprobs is not None])
    rollout = torch.cat([s.rollout_logprobs for s in batch if s.rollout_logprobs is not None])
    return mismatch_metrics(policy, rollout)


def importance(batch: list[Sequence], config: Config) -> dict[str, float]:
    """importance/* of the rollout correction, before truncation; nothing without one."""
    if config.rollout.importance_correction == "none":
        return {}
    ratios = [
        importance_ratios(s.old_logprobs, s.rollout_logprobs, config.rollout.importance_level)
        for s in batch
        if s.old_logprobs is not None and s.rollout_logprobs is not None
    ]
    return importance_metrics(ratios, config.rollout.importance_correction, config.rollout.importance_cap)


def entropy_profile(samples: list[Sample], scores: Scores) -> dict[str, float]:
    """Where the entropy lies: token means over the rollout, over correct and wrong responses, over their quarters.

    All are those of the policy before the step's first update. entropy/correct and entropy/wrong are left out where
    there is no such response, a quarter where no token falls.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for sample, entropies in zip(samples, scores.entropies, strict=True):
        outcome = "correct" if sample.correct else "wrong"
        parts.setdefault("entropy/rollout", []).append(entropies)
        parts.setdefault(f"entropy/{outcome}", []).append(entropies)
        for quarter, piece in enumerate(entropies.tensor_split(4), start=1):
            parts.setdefault(f"entropy/quarter_{quarter}", []).append(piece)
    joined = {name: torch.cat(pieces).double() for name, pieces in parts.items()}
    return {name: float(values.mean()) for name, values in joined.items() if values.numel()}


def mean_of(updates: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a rollout's optimizer steps: the mean of each, except the controller's, of which the last holds."""
    if len(updates) == 1:
        return updates[0]
    return {
        key: last if key.startswith("entropy/") else fmean(update[key] for update in updates)
        for key, last in updates[-1].items()
    }


def _sequence(sample: Sample, advantage: torch.Tensor) -> Sequence:
    return Sequence(
        tokens=torch.tensor(sample.prompt.tokens + sample.response_tokens, dtype=torch.int64),
        prompt_length=len(sample.prompt.tokens),
        advantages=advantage.expand(len(sample.response_tokens)).clone(),
        rollout_logprobs=torch.tensor(sample.rollout_logprobs, dtype=torch.float32),
    )
