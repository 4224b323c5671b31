"""From judged samples to what the policy trains on, and the statistics of a rollout."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from megatron_entropic.algorithms import advantages, mismatch_metrics
from megatron_entropic.config import Config
from megatron_entropic.types import Sample, Scores, Sequence


def decode_responses(samples: list[Sample], tokenizer: Any) -> None:
    """Give each sample its text, which verifiers and people read; special tokens are left out."""
    texts = tokenizer.batch_decode([sample.response_tokens for sample in samples], skip_special_tokens=True)
    for sample, text in zip(samples, texts, strict=True):
        sample.text = text


def training_batch(samples: list[Sample], config: Config) -> list[Sequence]:
    """One `Sequence` for each sample, in order; the advantage of a response holds for each of its tokens.

    Args:
        samples: judged, grouped by prompt, `rollout.samples_per_prompt` of each.
    """
    per_prompt = config.rollout.samples_per_prompt
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float32).view(-1, per_prompt)
    values = advantages(config.algorithm.advantage, rewards).flatten()
    return [_sequence(sample, value) for sample, value in zip(samples, values, strict=True)]


def minibatches(batch: list[Sequence], optimizer_steps: int) -> list[list[Sequence]]:
    """Split a rollout into equal parts of whole prompt groups, one for each optimizer step."""
    size = len(batch) // optimizer_steps
    return [batch[start : start + size] for start in range(0, size * optimizer_steps, size)]


def attach_scores(batch: list[Sequence], scores: Scores, reference: Scores | None) -> None:
    """Put the score pass's log-probs (and the reference's) on the sequences."""
    for index, sequence in enumerate(batch):
        sequence.old_logprobs = scores.logprobs[index]
        sequence.reference_logprobs = reference.logprobs[index] if reference else None


def rollout_metrics(samples: list[Sample], config: Config) -> dict[str, float]:
    """reward/* and response/* of one rollout.

    solved_none and solved_all are the shares of prompts of which no or every response has a positive reward: such
    groups teach nothing to a group-relative advantage.
    """
    per_prompt = config.rollout.samples_per_prompt
    rewards = [float(sample.reward or 0.0) for sample in samples]
    groups = [rewards[start : start + per_prompt] for start in range(0, len(rewards), per_prompt)]
    lengths = [len(sample.response_tokens) for sample in samples]
    return {
        "reward/mean": fmean(rewards),
        "reward/solved_none": fmean(all(reward <= 0 for reward in group) for group in groups),
        "reward/solved_all": fmean(all(reward > 0 for reward in group) for group in groups),
        "response/length_mean": fmean(lengths),
        "response/length_max": float(max(lengths)),
        "response/truncated_fraction": fmean(sample.finish_reason == "length" for sample in samples),
    }


def mismatch(batch: list[Sequence]) -> dict[str, float]:
    """How far the engines' log-probs are from the policy's own, before any update of this step."""
    policy = torch.cat([s.old_logprobs for s in batch if s.old_logprobs is not None])
    rollout = torch.cat([s.rollout_logprobs for s in batch if s.rollout_logprobs is not None])
    return mismatch_metrics(policy, rollout)


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
