"""Deals sequences to data-parallel replicas. Pure functions of lengths: the driver calls them, no processes.

Loss weights come from global counts (algorithms/aggregation), so no result depends on the deal.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_entropic.models.dimensions import ModelDimensions


def attention_weight(dimensions: ModelDimensions) -> float:
    """Work of causal attention over that of all matrix products, for each token of a sequence; 1 / tokens.

    A token of a sequence of L tokens costs 2 P operations in products with P parameters, and in each layer 4 a L / 2 in
    attention of width a: the ratio is L * layers * a / P. Every token is taken for a response token. Where values are
    narrower than keys, a is the mean.
    """
    feed_forward = 3 * sum(_feed_forward_width(dimensions, layer) for layer in range(dimensions.num_layers))
    products = dimensions.hidden_size * (feed_forward + dimensions.vocab_size)
    products += dimensions.num_layers * _attention_products(dimensions)
    width = (dimensions.size("query") + dimensions.size("attended")) / 2
    return dimensions.num_layers * width / products


def _attention_products(dimensions: ModelDimensions) -> int:
    """Number of parameters of a layer's attention projections."""
    hidden, query, output = dimensions.hidden_size, dimensions.size("query"), dimensions.size("attended")
    if dimensions.latent is None:
        return hidden * (query + 2 * dimensions.size("key_value") + output)
    rank = dimensions.latent.query_rank
    queries = hidden * query if rank is None else rank * (hidden + query)
    keys_and_values = dimensions.size("key_value_latent") * dimensions.size("key_value_unrotated")
    return queries + hidden * (dimensions.size("key_value_latent_and_rotary") + output) + keys_and_values


def _feed_forward_width(dimensions: ModelDimensions, layer: int) -> int:
    """Width of the feed-forward part that one token goes through in a layer."""
    if dimensions.experts is None or not dimensions.has_experts(layer):
        return dimensions.ffn_hidden_size
    experts = dimensions.experts
    return experts.per_token * experts.ffn_hidden_size + experts.shared_ffn_hidden_size


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
    loads = [(0.0, 0, group) for group in range(count)]  # sum, number of members, number of the group: a heap
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, members, target = loads[0]
        groups[target].append(index)
        heapq.heapreplace(loads, (load + costs[index], members + 1, target))
    return groups
