"""How well an optimizer step fills the ranks: what was computed for padding, and how unequal replicas' work was."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_entropic.policy.batch.balance import sequence_costs
from megatron_entropic.policy.batch.microbatch import MicroBatch
from megatron_entropic.policy.megatron.parallel import ParallelState


def batch_metrics(
    batch: list[MicroBatch], attention_weight: float, parallel: ParallelState, device: torch.device
) -> dict[str, float]:
    """Metrics of this replica's micro-batches and those of all others, equal on all ranks.

    Args:
        batch: of this replica.
        attention_weight: see `sequence_costs`.
        parallel: this rank's place.
        device: of the policy.

    Returns:
        batch/padding_fraction: packed tokens that belong to no sequence, over all packed tokens;
        batch/imbalance: work of the busiest replica over the mean of all, minus 1;
        batch/microbatches: of each replica.
    """
    replicas = torch.zeros(parallel.data_size, 3, dtype=torch.float64, device=device)
    if parallel.context_rank == 0:
        lengths = [sequence.tokens.numel() for micro_batch in batch for sequence in micro_batch.sequences]
        packed = sum(int(micro_batch.cu_seqlens[-1]) for micro_batch in batch)
        own = [sum(lengths), packed, sum(sequence_costs(lengths, attention_weight))]
        replicas[parallel.data_rank] = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(replicas, group=parallel.data_context_group)
    tokens, packed_tokens, costs = replicas.unbind(1)
    return {
        "batch/padding_fraction": 1 - float(tokens.sum() / packed_tokens.sum()),
        "batch/imbalance": float(costs.max() / costs.mean()) - 1,
        "batch/microbatches": float(len(batch)),
    }
