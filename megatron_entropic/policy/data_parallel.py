"""How sequences are dealt to data-parallel replicas. Pure functions of lengths: the driver calls them, no processes.

Loss weights come from global counts (algorithms/aggregation), so no result depends on the deal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_entropic.weights.dimensions import ModelDimensions


def attention_weight(dimensions: ModelDimensions) -> float:
    """Arithmetic of causal attention over that of all matrix products, for each token of a sequence; 1 / tokens.

    A token of a sequence of L tokens costs 2 P operations in products with P parameters, and in each layer 4 a L / 2 in
    attention of width a: the ratio is L * layers * a / P. Every token is taken for a response token.
    """
    attention = 2 * dimensions.num_layers * (dimensions.size("query") + dimensions.size("key_value"))
    feed_forward = 3 * sum(_feed_forward_width(dimensions, layer) for layer in range(dimensions.num_layers))
    products = dimensions.hidden_size * (attention + feed_forward + dimensions.vocab_size)
    return dimensions.num_layers * dimensions.size("query") / products


def _feed_forward_width(dimensions: ModelDimensions, layer: int) -> int:
    """Of what one token goes through."""
    if dimensions.experts is None or not dimensions.has_experts(layer):
        return dimensions.ffn_hidden_size
    return dimensions.experts.per_token * dimensions.experts.ffn_hidden_size


def sequence_costs(lengths: Sequence[int], attention_weight: float) -> list[float]:
    """Work of each sequence: L + attention_weight * L^2, in tokens without attention."""
    return [length + attention_weight * length**2 for length in lengths]


def data_parallel_shards(costs: Sequence[float], data_parallel: int) -> list[list[int]]:
    """Deal sequences so that replicas have close loads: the most costly first, to the replica with the least.

    Args:
        costs: work of each sequence in any unit (`sequence_costs`).
        data_parallel: number of replicas.

    Returns:
        For each replica the indices of its sequences, ascending. Every index occurs once; equal costs always give the
        same deal. A replica may be empty when there are fewer sequences than replicas. The fullest replica has at most
        max(costs) more than the emptiest.

    Raises:
        ValueError: data_parallel < 1.
    """
    if data_parallel < 1:
        raise ValueError(f"data_parallel must be at least 1, not {data_parallel}")
    return [sorted(shard) for shard in spread(costs, data_parallel)]


def spread(costs: Sequence[float], count: int) -> list[list[int]]:
    """Indices in `count` groups of close sums: the largest first, each to the group with the least; ties by order."""
    groups: list[list[int]] = [[] for _ in range(count)]
    load = [0.0] * count
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        target = min(range(count), key=lambda group: (load[group], len(groups[group]), group))
        groups[target].append(index)
        load[target] += costs[index]
    return groups
