"""Counts over a whole optimizer step, summed over replicas: what loss weights divide by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.types import Sequence


@dataclass(frozen=True)
class Normalizers:
    """Counts over the whole optimizer step: all micro-batches, all replicas."""

    tokens: float
    """Response tokens."""
    sequences: float
    high_prob_tokens: float = 0.0
    """Response tokens with pi > tau under the weights before this step, read by `denominator: high_prob_tokens`; a
    micro-batch that holds more of them than this uses its own count."""
    scale: float = 1.0
    """Factor of a micro-batch's whole share of the loss: 1, except in `feedback: microbatch_local`."""


def global_counts(
    sequences: list[Sequence], parallel: ParallelState, device: torch.device, high_prob_tokens: float = 0.0
) -> Normalizers:
    """Sum the counts of all replicas; known on every rank, since all ranks of a replica hold its sequences.

    Args:
        sequences: this replica's.
        parallel: this rank's place.
        device: of the policy.
        high_prob_tokens: this replica's count.
    """
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    # Context-parallel ranks hold the same sequences: one of them counts.
    if parallel.context_rank == 0:
        tokens = sum(sequence.response_length for sequence in sequences)
        counts += torch.tensor([tokens, len(sequences), high_prob_tokens], dtype=torch.float64, device=device)
    dist.all_reduce(counts, group=parallel.data_context_group)
    return Normalizers(*counts.tolist())
