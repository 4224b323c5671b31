"""Alpha token by token: factors of EntroPIC's term where prompts have alphas of their own, and what to log of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.algorithms import Steering
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.types import Sequence

SOLVED_BINS = 5
"""Number of equal parts of the share of right responses into which tokens are sorted for the log."""
_LEVELS = 256
"""Number of parts of that share by which quantiles of alpha are found; more than responses of a prompt."""


def term_factors(
    steering: Steering, success: Tensor | None, term_weights: Tensor, weights: Tensor, limit: float | None
) -> Tensor:
    """Factors [T] of the tokens' EntroPIC terms: alpha times their weights, bounded by `limit` times the loss's own.

    Args:
        steering: what the controller asks for.
        success: [T] share of right responses of each token's prompt; read where prompts have alphas of their own.
        term_weights: [T] weights of the term, those of high-probability tokens with that denominator.
        weights: [T] weights of the policy loss.
        limit: `entropy_control.weight_limit`.

    Raises:
        ValueError: prompts have alphas of their own, and nobody said how often they were solved.
    """
    if steering.prompt_alpha is None:
        factors = steering.alpha * term_weights
    else:
        factors = steering.alphas(known_success(success)) * term_weights
    return factors if limit is None else factors.clamp(-limit * weights, limit * weights)


def known_success(success: Tensor | None) -> Tensor:
    """The shares [T], which the controller reads.

    Raises:
        ValueError: sequences carry none.
    """
    if success is None:
        raise ValueError("the controller reads how often each prompt was solved, and sequences carry no success")
    return success


def solved_bins(success: Tensor, tokens: Tensor) -> Tensor:
    """Number of marked tokens of prompts with shares in [0, .2), [.2, .4) .. [.8, 1], [SOLVED_BINS] float64.

    Args:
        success: [T] shares.
        tokens: [T] bool, the marks.
    """
    # No bincount: on a GPU the host would wait for it.
    bins = (success * SOLVED_BINS).long().clamp(max=SOLVED_BINS - 1)
    places = torch.arange(SOLVED_BINS, device=success.device)
    return ((bins.unsqueeze(1) == places) & tokens.unsqueeze(1)).sum(dim=0).double()


def prompt_alpha_metrics(
    sequences: list[Sequence], steering: Steering, parallel: ParallelState, device: torch.device
) -> dict[str, float]:
    """Mean, 10th and 90th percentile of alpha over the tokens of all replicas with A != 0; all ranks call it together.

    Args:
        sequences: sequences of this replica, with advantages and success.
        steering: one with `prompt_alpha`.
        parallel: this rank's place.
        device: device of the collective.
    """
    counts = torch.zeros(_LEVELS + 1, dtype=torch.float64)
    if parallel.context_rank == 0:
        for sequence in sequences:
            assert sequence.advantages is not None
            assert sequence.success is not None
            counts[round(sequence.success * _LEVELS)] += int((sequence.advantages != 0).sum())
    summed = counts.to(device)
    dist.all_reduce(summed, group=parallel.data_context_group)
    counts = summed.cpu()
    total = float(counts.sum())
    if not total:
        return {"entropy/alpha": 0.0, "entropy/alpha_p10": 0.0, "entropy/alpha_p90": 0.0}
    alphas = steering.alphas(torch.linspace(0.0, 1.0, _LEVELS + 1, dtype=torch.float64))
    # Alpha never falls with the share, so its quantiles are at those of the share.
    reached = counts.cumsum(0)
    low, high = (int(torch.searchsorted(reached, quantile * total)) for quantile in (0.1, 0.9))
    return {
        "entropy/alpha": float((counts * alphas).sum()) / total,
        "entropy/alpha_p10": float(alphas[low]),
        "entropy/alpha_p90": float(alphas[high]),
    }
