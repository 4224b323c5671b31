"""From parameters spread over tensor and pipeline ranks to whole Hugging Face tensors, one flat bucket at a time.

owner stage:    shards of a bucket, flat --one all-gather over TP--> unshard --> Hugging Face tensors, flat
                experts: over expert TP x EP instead
                --one send--> first stage, unless each stage's own first tensor rank is where they are wanted
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from megatron_entropic.policy.parallel import ParallelState
from megatron_entropic.policy.transformer_config import DTYPES
from megatron_entropic.weights.parameter_map import ParameterMap
from megatron_entropic.weights.plan import Bucket, PublishPlan
from megatron_entropic.weights.transport import FlatContents, named_wait


def sends_weights(parallel: ParallelState) -> bool:
    """Whether this rank takes part in a gather: of those that hold the same parameters, the first one sends."""
    return _sends_dense(parallel) or parallel.expert_data_rank == 0


def _sends_dense(parallel: ParallelState) -> bool:
    return parallel.data_rank == 0 and parallel.context_rank == 0


def gather_bucket(
    bucket: Bucket,
    values: Mapping[str, torch.Tensor],
    parameter_map: ParameterMap,
    parallel: ParallelState,
    phase: str,
    *,
    to_first_stage: bool = True,
) -> torch.Tensor | None:
    """Bring one bucket to one rank; called by all ranks for which `sends_weights` holds.

    Args:
        bucket: of the plan that all ranks share.
        values: this rank's shards by global Megatron name.
        parameter_map: of the model.
        parallel: this rank's place.
        phase: what the run is doing, for messages.
        to_first_stage: bring it to rank 0; otherwise it stays on the first tensor rank of its own stage.

    Returns:
        [bucket.elements] of the bucket's dtype on that rank, in the order of `bucket.hf_names`; None on other ranks.

    Raises:
        PhaseTimeout, PeerDied: naming bucket, this rank and its peers.
    """
    where = f"{phase}: bucket {bucket.index} ({bucket.items[0].entry.megatron_name} ..)"
    flat = None
    holds = parallel.expert_data_rank == 0 if bucket.of_experts else _sends_dense(parallel)
    if parallel.pipeline_rank == bucket.owner_stage and holds:
        peers = "the expert-parallel ranks of its stage" if bucket.of_experts else "the tensor ranks of its stage"
        with named_wait(where, f"policy {parallel.describe()}", peers):
            shards = _all_gather_shards(bucket, values, parallel)
        if parallel.is_first_of_stage:
            flat = _join(bucket, shards, parameter_map)
    if not to_first_stage or bucket.owner_stage == 0 or not parallel.is_first_of_stage:
        return flat
    return _send_to_first_stage(bucket, flat, values, parallel, where)


def gather_hf_tensors(
    plan: PublishPlan,
    values: Mapping[str, torch.Tensor],
    parameter_map: ParameterMap,
    parallel: ParallelState,
    phase: str,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the whole model on rank 0, in plan order; nothing on other ranks.

    All ranks for which `sends_weights` holds must exhaust it. Tensors are views of their bucket's buffer.
    """
    for bucket in plan.buckets:
        flat = gather_bucket(bucket, values, parameter_map, parallel, phase)
        if flat is not None:
            yield from FlatContents.of_bucket(bucket).split(flat)


def _all_gather_shards(bucket: Bucket, values: Mapping[str, torch.Tensor], parallel: ParallelState) -> torch.Tensor:
    """[ranks, shard_elements]: every rank's part of the bucket, one collective whatever the number of tensors."""
    dtype, items = DTYPES[bucket.dtype], bucket.held_by(parallel.expert_rank)
    mine = torch.cat([values[item.entry.megatron_name].detach().flatten().to(dtype) for item in items])
    assert mine.numel() == bucket.shard_elements, "parameters have the shapes of the plan"
    group = parallel.expert_group if bucket.of_experts else parallel.tensor_group
    if group.size() == 1:
        return mine.unsqueeze(0)
    gathered = mine.new_empty(group.size() * mine.numel())
    dist.all_gather_into_tensor(gathered, mine, group=group)
    return gathered.view(group.size(), -1)


def _join(bucket: Bucket, shards: torch.Tensor, parameter_map: ParameterMap) -> torch.Tensor:
    """[bucket.elements]: whole Hugging Face tensors without padding, from shards [ranks, shard_elements]."""
    pieces: dict[str, torch.Tensor] = {}
    owners = 1 + max(item.expert_rank for item in bucket.items)
    for owner, of_owner in enumerate(shards.unflatten(0, (owners, -1))):
        items = bucket.held_by(owner)
        for item, parts in zip(items, of_owner.split([i.shard_elements for i in items], dim=1), strict=True):
            pieces |= parameter_map.to_hf(item.entry, [part.reshape(item.shard_shape) for part in parts])
    return torch.cat([pieces[name].flatten() for name in bucket.hf_names])


def _send_to_first_stage(
    bucket: Bucket,
    flat: torch.Tensor | None,
    values: Mapping[str, torch.Tensor],
    parallel: ParallelState,
    where: str,
) -> torch.Tensor | None:
    """Point to point from the owner stage; stages that are neither owner nor first only pass by."""
    group = parallel.pipeline_group
    if parallel.pipeline_rank == bucket.owner_stage:
        assert flat is not None
        first = dist.get_global_rank(group, 0)
        with named_wait(where, f"policy {parallel.describe()}", f"policy rank {first}, to which it sends"):
            dist.send(flat, dst=first, group=group)
        return None
    if not parallel.is_first_stage:
        return None
    owner = dist.get_global_rank(group, bucket.owner_stage)
    received = next(iter(values.values())).new_empty(bucket.elements, dtype=DTYPES[bucket.dtype])
    with named_wait(where, f"policy {parallel.describe()}", f"policy rank {owner}, which owns the bucket"):
        dist.recv(received, src=owner, group=group)
    return received
