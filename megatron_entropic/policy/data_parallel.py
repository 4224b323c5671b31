"""How sequences are dealt to data-parallel replicas. A pure function of lengths: the driver calls it, no processes.

Loss weights come from global counts (algorithms/aggregation), so no result depends on the deal.
"""

from __future__ import annotations

from collections.abc import Sequence


def data_parallel_shards(lengths: Sequence[int], data_parallel: int) -> list[list[int]]:
    """Deal sequences so that replicas hold close token counts: longest first, to the replica with the fewest tokens.

    Args:
        lengths: tokens of each sequence.
        data_parallel: number of replicas.

    Returns:
        For each replica the indices of its sequences, ascending. Every index occurs once; equal lengths always give the
        same deal. A replica may be empty when there are fewer sequences than replicas. The fullest replica has at most
        max(lengths) tokens more than the emptiest.

    Raises:
        ValueError: data_parallel < 1.
    """
    if data_parallel < 1:
        raise ValueError(f"data_parallel must be at least 1, not {data_parallel}")
    shards: list[list[int]] = [[] for _ in range(data_parallel)]
    load = [0] * data_parallel
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = min(range(data_parallel), key=lambda rank: (load[rank], len(shards[rank]), rank))
        shards[target].append(index)
        load[target] += lengths[index]
    return [sorted(shard) for shard in shards]
