"""What one publication of weights to the engines moves: `weights.plan` in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_entropic.config.run import Config
from megatron_entropic.planning.hardware import Hardware
from megatron_entropic.planning.parameters import ParameterTable

BUCKET_BYTES = 512 * 2**20
"""The policy's on GPUs (`policy.publish`); a test compares."""


@dataclass(frozen=True)
class Publication:
    """One publication."""

    engine_bytes: int
    """Received by each engine."""
    buckets: int
    collectives: int
    """Gathers, sends and broadcasts."""
    gathered_bytes: int
    """Sent by each GPU to those that hold the rest of a bucket, summed over buckets, busiest stage."""
    forwarded_bytes: int
    """Sent to the first stage by all others."""

    def time_s(self, hardware: Hardware, *, across_nodes: bool) -> float:
        """Gather, forward and broadcast one after the other; the broadcast at the rate of rank 0's port."""
        inside, outside = hardware.link_bytes_per_s(False), hardware.link_bytes_per_s(across_nodes)
        return self.gathered_bytes / inside + self.forwarded_bytes / outside + self.engine_bytes / outside


def publication(config: Config, table: ParameterTable) -> Publication:
    """The publication of a configuration; the layout must divide the model."""
    policy, dtype = config.policy, config.model.dtype
    plan = table.publish_plan(policy, dtype, BUCKET_BYTES)
    per_stage = [
        sum(b.shard_bytes * (plan.gather_ranks(b) - 1) for b in plan.buckets if b.owner_stage == stage)
        for stage in range(policy.pipeline_parallel)
    ]
    return Publication(
        engine_bytes=plan.bytes,
        buckets=len(plan.buckets),
        collectives=sum(len(plan.collectives(bucket)) for bucket in plan.buckets),
        gathered_bytes=max(per_stage),
        forwarded_bytes=sum(bucket.bytes for bucket in plan.buckets if bucket.owner_stage > 0),
    )
