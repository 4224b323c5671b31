"""Small numbers that all policy ranks must agree on. Every function here is called by all ranks of its group."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_entropic.policy.megatron.parallel import ParallelState


def all_ranks(condition: bool, device: torch.device) -> bool:
    """Whether `condition` holds on every rank."""
    return int(_reduced(int(condition), dist.ReduceOp.MIN, device)) == 1


def largest(number: int, device: torch.device) -> int:
    """Largest `number` of any rank."""
    return int(_reduced(number, dist.ReduceOp.MAX, device))


def _reduced(number: int, operation: dist.ReduceOp.RedOpType, device: torch.device) -> torch.Tensor:
    value = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(value, op=operation)
    return value


def sum_of_token_statistics(values: torch.Tensor, parallel: ParallelState) -> torch.Tensor:
    """Global sums of what last stages measured on their own tokens.

    One SUM over data-parallel replicas. Context and tensor parallel ranks hold the same values, gathered or merged
    (`context_parallel`, `tensor_parallel`), and count once. Other stages measured nothing; they receive the result, so
    logs and checkpoints agree.

    Args:
        values: [k] float64 on the policy's device; on stages before the last only its size matters.

    Returns:
        [k] float64, the same on every rank, bit for bit.
    """
    assert values.dtype == torch.float64, "sums over a whole batch lose digits in float32"
    total = values.clone()
    if parallel.is_last_stage:
        if parallel.context_rank:
            total.zero_()
        dist.all_reduce(total, group=parallel.data_context_group)
    if parallel.pipeline_size > 1:
        dist.broadcast(total, src=parallel.last_stage_rank, group=parallel.pipeline_group)
    return total


def verify_equal(values: Mapping[str, float], subject: str, parallel: ParallelState, device: torch.device) -> None:
    """Check that replicated numbers are the same on all ranks, bit for bit.

    Args:
        values: the numbers, same names on every rank.
        subject: what they are, for the message.

    Raises:
        RuntimeError: on every rank; names the ranks that differ from rank 0, and for each differing number all values.
    """
    names = sorted(values)
    mine = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(parallel.world_size)]
    dist.all_gather(gathered, mine)
    columns = {name: [float(row[column]) for row in gathered] for column, name in enumerate(names)}
    differing = {name: column for name, column in columns.items() if len({_bits(value) for value in column}) > 1}
    if not differing:
        return
    ranks = [r for r in range(parallel.world_size) if any(_bits(c[r]) != _bits(c[0]) for c in differing.values())]
    listed = "; ".join(f"{name} by rank: {column}" for name, column in differing.items())
    raise RuntimeError(f"{subject} must be the same on every rank, but ranks {ranks} differ from rank 0: {listed}")


def _bits(value: float) -> bytes:
    return struct.pack("<d", value)
