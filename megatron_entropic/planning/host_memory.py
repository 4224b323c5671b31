"""Host memory that a checkpoint takes of a node, until its files are written."""

from __future__ import annotations

from megatron_entropic.config.run import Config
from megatron_entropic.planning.memory import optimizer_bytes_per_element, overlaps
from megatron_entropic.planning.parameters import ITEM_BYTES, ParameterTable

WHOLE_BYTES_PER_PARAMETER = 27
"""Of what `fully_reshardable` takes for each parameter of a rank's stage, whatever the number of replicas. Measured
with benchmarks/checkpoint_memory.py: 3,143 MB on each of four ranks that replicate 116.5 million parameters."""


def checkpoint_host_bytes(config: Config, table: ParameterTable, ranks_per_node: int) -> int:
    """Bytes on the fullest node, nodes being filled with policy ranks one after the other.

    A rank copies its part of the optimizer state, the first replica also the weights.
    """
    policy = config.policy
    ranks = policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel * policy.data_parallel
    of_rank = [_rank_bytes(config, table, *divmod(rank, ranks // policy.pipeline_parallel)) for rank in range(ranks)]
    return max(sum(of_rank[first : first + ranks_per_node]) for first in range(0, ranks, ranks_per_node))


def _rank_bytes(config: Config, table: ParameterTable, stage: int, place: int) -> int:
    """What the rank at a place of its stage copies; tensor ranks lie next to each other, replicas do not."""
    policy, dtype = config.policy, config.model.dtype
    parameters = table.stage(policy, stage)
    first_replica = place < policy.tensor_parallel
    if policy.distributed_optimizer and config.checkpoint.format == "fully_reshardable":
        return WHOLE_BYTES_PER_PARAMETER * parameters.elements
    experts = sum(shard.elements for shard in parameters.shards if shard.expert)
    written = parameters.elements - experts if first_replica else 0
    if place < policy.expert_parallel * policy.expert_tensor_size:
        written += experts
    kept = written
    if policy.distributed_optimizer:
        kept = sum(buffer.owned_elements(0) for buffer in table.buffers(policy, stage, overlap=overlaps(config)))
    return written * ITEM_BYTES[dtype] + kept * optimizer_bytes_per_element(dtype)
