"""Metrics of conversations with an environment, of one rollout; none where no environment takes part.

environment/turns_mean, turns_max   turns of the policy
environment/tokens_mean             tokens that the environment wrote after the prompt
environment/ended_NAME              share of the conversations that ended so, see `environments.conversation.Ending`
entropy/turn_J                      mean entropy of the policy's tokens in turn J of a context, nats; from TURNS_APART
                                    on together
authority/turn_J                    share of these tokens on which the entropy control can act: A != 0 and pi > tau
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from megatron_entropic.observability.metrics import TURNS_APART
from megatron_entropic.types import Scores, TrainingBatch, Trajectory


def conversation_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Metrics environment/*."""
    if not any(one.ending for one in trajectories):
        return {}
    turns = [sum(int(context.turn_numbers[-1]) for context in one.contexts) for one in trajectories]
    said = [sum(part.continuation_length - part.response_length for part in one.contexts) for one in trajectories]
    endings = Counter(one.ending for one in trajectories)
    return {
        "environment/turns_mean": fmean(turns),
        "environment/turns_max": float(max(turns)),
        "environment/tokens_mean": fmean(said),
        **{f"environment/ended_{name}": count / len(trajectories) for name, count in sorted(endings.items())},
    }


def turn_profile(batch: TrainingBatch, scores: Scores, tau: float | None) -> dict[str, float]:
    """Metrics entropy/turn_* and authority/turn_*, of the policy before the step's first update.

    Args:
        batch: the batch, with advantages.
        scores: scores of its sequences.
        tau: threshold of the entropy control; None: it acts on no token.
    """
    trajectories = batch.trajectories
    if not any(one.ending for one in trajectories):
        return {}
    turns = np.minimum(np.concatenate([one.turn_numbers for one in trajectories]), TURNS_APART)
    entropies = np.concatenate([values.double().numpy() for values in scores.entropies])
    found = {f"entropy/turn_{turn}": float(entropies[turns == turn].mean()) for turn in np.unique(turns)}
    if tau is not None:
        probabilities = np.concatenate([values.exp().numpy() for values in scores.logprobs])
        advantages = np.concatenate([s.advantages.numpy() for s in batch.sequences if s.advantages is not None])
        reached = (probabilities > tau) & (advantages != 0)
        found |= {f"authority/turn_{turn}": float(reached[turns == turn].mean()) for turn in np.unique(turns)}
    return found
