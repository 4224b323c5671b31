"""The part of a step that learns from judged groups: the score pass, then the optimizer steps.

The trainer does it with all ranks, `replay` with one rank in its own process.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, chain
from statistics import fmean
from typing import Protocol

import numpy as np
import torch

from megatron_entropic.algorithms import (
    advantages,
    corrections,
    distilled,
    importance_metrics,
    importance_ratios,
    mismatch_metrics_of,
)
from megatron_entropic.algorithms.token_sums import Sums, summed
from megatron_entropic.config.algorithm import AlgorithmConfig, DistillationConfig, FrozenName
from megatron_entropic.config.run import Config, RolloutConfig
from megatron_entropic.errors import RunError
from megatron_entropic.training.conversation_metrics import conversation_metrics, turn_profile
from megatron_entropic.types import Group, Scores, Sequence, TrainingBatch, Trajectory


class Learner(Protocol):
    """A policy that scores and updates, wherever its ranks are."""

    def score(self, sequences: list[Sequence], *, frozen: FrozenName | None = None) -> Scores:
        """Log-probs and entropies of the response tokens under the policy (or a frozen model beside it)."""

    def update(self, minibatch: list[Sequence]) -> dict[str, float]:
        """Take one optimizer step; returns its metrics."""


def training_batch(groups: list[Group], advantage: str) -> TrainingBatch:
    """Make one sequence of each context of each trajectory; the advantage holds for each token of them.

    An attempt whose environment failed before the policy wrote anything has none.

    Each sequence carries the success of its whole group, wherever the group's sequences are trained.

    Args:
        groups: judged groups, all of the same size.
        advantage: `algorithm.advantage`.
    """
    rewards = torch.tensor([[reward.value for reward in group.rewards] for group in groups], dtype=torch.float32)
    values = advantages(advantage, rewards).flatten()
    judged = [(trajectory, group.success) for group in groups for trajectory in group.trajectories]
    sequences = tuple(
        _sequence(context, value, success)
        for (trajectory, success), value in zip(judged, values, strict=True)
        for context in trajectory.contexts
    )
    if not sequences:
        failure = next((one.verdict.message for one, _ in judged if one.verdict is not None), "")
        raise RunError(f"no conversation of the step came to the policy's first word: {failure}")
    return TrainingBatch(tuple(groups), sequences)


def score_batch(
    policy: Learner, batch: TrainingBatch, config: Config, *, version: int
) -> tuple[TrainingBatch, Scores, dict[str, float]]:
    """Score a batch; returns it with old and reference log-probs, the scores they are from, and metrics of these.

    Args:
        policy: the policy before the step's first update.
        version: version of the policy's weights.
    """
    if config.algorithm.kl.coefficient:
        batch = batch.with_reference(policy.score(list(batch.sequences), frozen="reference"))
    distillation = config.algorithm.distillation
    taught = policy.score(list(batch.sequences), frozen="teacher") if distillation.as_advantage else None
    scores = policy.score(list(batch.sequences))
    batch = batch.scored(scores)
    batch, learned = with_teacher(batch, taught, distillation)
    measured = {**entropy_profile(batch, scores), **mismatch(batch), **importance(batch, config.rollout)}
    measured |= learned
    tau = config.entropy_control.tau if config.entropy_control.steers_alpha else None
    measured |= turn_profile(batch, scores, tau)
    return batch, scores, measured | (staleness(batch, version) if config.rollout.lag else {})


def with_teacher(
    batch: TrainingBatch, taught: Scores | None, distillation: DistillationConfig
) -> tuple[TrainingBatch, dict[str, float]]:
    """The scored batch with advantages of rewards and teacher, and metrics distillation/*; unchanged without a teacher.

    distillation/kl               mean log pi - log pi_teacher of the sampled tokens, nats: estimates KL(pi || teacher)
    distillation/teacher_logprob  mean log-prob of the sampled tokens under the teacher, nats

    Args:
        batch: scored batch.
        taught: log-probs of its tokens under the teacher; None where it does not give advantages.
        distillation: `algorithm.distillation`.
    """
    if distillation.teacher_hf_dir is None:
        return batch, {}
    logprobs = [sequence.old_logprobs for sequence in batch.sequences]
    weights = {"coefficient": distillation.coefficient, "reward_weight": distillation.reward_weight}
    sequences = []
    for sequence, own, teacher in zip(batch.sequences, logprobs, taught.logprobs if taught else logprobs, strict=True):
        assert sequence.advantages is not None
        assert own is not None
        assert teacher is not None
        sequences.append(replace(sequence, advantages=distilled(sequence.advantages, own, teacher, **weights)))
    batch = TrainingBatch(batch.groups, tuple(sequences))
    if taught is None:
        return batch, {}

    def measure(sums: Sums, own: torch.Tensor, teacher: torch.Tensor) -> None:
        sums.add("kl", own.double() - teacher.double())
        sums.add("teacher_logprob", teacher.double())

    olds = (sequence.old_logprobs for sequence in batch.sequences)
    sums = summed(((old, of) for old, of in zip(olds, taught.logprobs, strict=True) if old is not None), measure)
    return batch, {f"distillation/{name}": sums.mean(name) for name in ("kl", "teacher_logprob")}


def update_policy(
    policy: Learner, batch: TrainingBatch, algorithm: AlgorithmConfig, *, seed: int, step: int
) -> dict[str, float]:
    """Take all optimizer steps of rollout step `step`; returns their metrics, see `mean_of`."""
    updates = []
    for epoch in range(algorithm.epochs_per_rollout):
        if epoch and algorithm.proximal_logprobs == "each_epoch":
            batch = batch.scored(policy.score(list(batch.sequences)))
        order = f"{seed}/{step}/{epoch}" if epoch else None
        updates += [policy.update(part) for part in minibatches(batch, algorithm.optimizer_steps_per_rollout, order)]
    return mean_of(updates)


def minibatches(batch: TrainingBatch, parts: int, order: str | None) -> list[list[Sequence]]:
    """Split a rollout into equal parts of whole groups, one for each optimizer step of an epoch.

    Args:
        batch: groups of one size.
        parts: number of parts, which divides the number of groups.
        order: text of which the order of the groups is a function; None keeps that of the batch.
    """
    sizes = [sum(len(one.contexts) for one in group.trajectories) for group in batch.groups]
    starts = accumulate(sizes, initial=0)
    groups = [batch.sequences[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    if order is not None:
        random.Random(order).shuffle(groups)
    width = len(groups) // parts
    return [list(chain.from_iterable(groups[part * width : (part + 1) * width])) for part in range(parts)]


def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """Metrics reward/* and response/* of one rollout.

    solved_none and solved_all are the shares of tasks of which no or every trajectory is correct: such groups teach
    nothing to a group-relative advantage of the verifier's reward. solved_share_1 to _5 are the shares of tasks of
    which [0, 20 %), .. [80, 100 %] of the trajectories are correct.
    """
    fifths = [min(int(5 * group.success), 4) for group in groups]
    solved = [[reward.correct for reward in group.rewards] for group in groups]
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    lengths = [trajectory.response_length for trajectory in trajectories]
    return {
        "reward/mean": fmean(reward.value for group in groups for reward in group.rewards),
        "reward/solved_none": fmean(not any(group) for group in solved),
        "reward/solved_all": fmean(all(group) for group in solved),
        **{f"reward/solved_share_{fifth + 1}": fifths.count(fifth) / len(fifths) for fifth in range(5)},
        "response/length_mean": fmean(lengths),
        "response/length_max": float(max(lengths)),
        "response/truncated_fraction": fmean(one.finish_reason == "length" for one in trajectories),
        **conversation_metrics(trajectories),
    }


def mismatch(batch: TrainingBatch) -> dict[str, float]:
    """Metrics mismatch/* of the distance between the engines' log-probs and the policy's for the same weights.

    Where the policy was not asked for those of the weights that sampled, staleness is in them.
    """
    return mismatch_metrics_of(_pairs(batch, "own_logprobs", "rollout_logprobs"))


def staleness(batch: TrainingBatch, version: int) -> dict[str, float]:
    """Metrics staleness/* of tokens that older weights sampled than the policy's, whose version is `version`.

    staleness/versions_mean, versions_max   by how many versions a token is older
    staleness/stale_fraction                share of the tokens that are older at all
    staleness/mixed_fraction                share of the responses that several versions sampled
    staleness/logprob_abs_mean, k3 and the like, as mismatch/*, of log pi_old - log pi_sampled-it over all tokens, where
        the policy was asked for the latter
    """
    trajectories = batch.trajectories
    segments = [segment for one in trajectories for segment in one.written]
    ages = np.array([version - s.weights_version for s in segments])
    tokens = np.array([s.tokens.size for s in segments])
    found = {
        "staleness/versions_mean": float((ages * tokens).sum() / tokens.sum()),
        "staleness/versions_max": float(ages[tokens > 0].max()),
        "staleness/stale_fraction": float(tokens[ages > 0].sum() / tokens.sum()),
        "staleness/mixed_fraction": fmean(len({s.weights_version for s in one.written}) > 1 for one in trajectories),
    }
    if any(s.sampling_logprobs is not None for s in batch.sequences):
        found |= mismatch_metrics_of(_pairs(batch, "old_logprobs", "own_logprobs"), prefix="staleness/")
    return found


def importance(batch: TrainingBatch, rollout: RolloutConfig) -> dict[str, float]:
    """Metrics importance/* of each of the rollout's `corrections`, before truncation; none without a correction."""
    found: dict[str, float] = {}
    for one in corrections(rollout.importance_correction, rollout.staleness_correction):
        ratios = (
            importance_ratios(above, below, rollout.importance_level)
            for above, below in _pairs(batch, one.above, one.below)
        )
        found |= importance_metrics(ratios, one.method, rollout.importance_cap, one.prefix)
    return found


def _pairs(batch: TrainingBatch, first: str, second: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields two kinds of log-probs of each sequence of a scored batch, [R] both."""
    for sequence in batch.sequences:
        yield getattr(sequence, first), getattr(sequence, second)


def entropy_profile(batch: TrainingBatch, scores: Scores) -> dict[str, float]:
    """Mean entropies of tokens, nats: of the rollout, of correct and wrong responses, of each quarter of responses.

    All are those of the policy before the step's first update. entropy/correct and entropy/wrong are left out where
    there is no such response, a quarter where no token falls.
    """
    pieces: dict[str, list[tuple[torch.Tensor]]] = {}
    for reward, entropies in zip(batch.rewards, scores.entropies, strict=True):
        outcome = "correct" if reward.correct else "wrong"
        pieces.setdefault("entropy/rollout", []).append((entropies,))
        pieces.setdefault(f"entropy/{outcome}", []).append((entropies,))
        for quarter, piece in enumerate(entropies.tensor_split(4), start=1):
            pieces.setdefault(f"entropy/quarter_{quarter}", []).append((piece,))
    found = {
        name: summed(of_one, lambda sums, values: sums.add("", values.double())) for name, of_one in pieces.items()
    }
    return {name: sums.mean("") for name, sums in found.items() if sums.count("")}


def mean_of(updates: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a rollout's optimizer steps: the mean of each, except the controller's, of which the last holds."""
    if len(updates) == 1:
        return updates[0]
    return {
        key: last if key.startswith("entropy/") else fmean(update[key] for update in updates)
        for key, last in updates[-1].items()
    }


def _sequence(trajectory: Trajectory, advantage: torch.Tensor, success: float) -> Sequence:
    sampling = trajectory.sampling_logprobs
    return Sequence(
        tokens=torch.from_numpy(trajectory.tokens),
        prompt_length=trajectory.task.tokens.size,
        advantages=advantage.expand(trajectory.response_length),
        rollout_logprobs=torch.from_numpy(trajectory.rollout_logprobs),
        sampling_logprobs=None if sampling is None else torch.from_numpy(sampling),
        success=success,
        mask=None if trajectory.mask is None else torch.from_numpy(trajectory.mask),
    )
