"""From parameters spread over tensor and pipeline ranks to whole Hugging Face tensors, one flat bucket at a time.

owner stage:    shards of a bucket, flat --one all-gather over TP--> unshard --> Hugging Face tensors, flat
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
    """Whether this rank takes part in a gather: replicas hold the same parameters, the first one sends."""
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
    if parallel.pipeline_rank == bucket.owner_stage:
        with named_wait(where, f"policy {parallel.describe()}", "the tensor ranks of its stage"):
            shards = _all_gather_shards(bucket, values, parallel)
        if parallel.tensor_rank == 0:
            flat = _join(bucket, shards, parameter_map)
    if not to_first_stage or bucket.owner_stage == 0 or parallel.tensor_rank != 0:
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
    """[tp, shard_elements]: every tensor rank's part of the bucket, one collective whatever the number of tensors."""
    dtype = DTYPES[bucket.dtype]
    mine = torch.cat([values[item.entry.megatron_name].detach().flatten().to(dtype) for item in bucket.items])
    assert mine.numel() == bucket.shard_elements, "parameters have the shapes of the plan"
    if parallel.tensor_size == 1:
        return mine.unsqueeze(0)
    gathered = mine.new_empty(parallel.tensor_size * mine.numel())
    dist.all_gather_into_tensor(gathered, mine, group=parallel.tensor_group)
    return gathered.view(parallel.tensor_size, -1)


def _join(bucket: Bucket, shards: torch.Tensor, parameter_map: ParameterMap) -> torch.Tensor:
    """[bucket.elements]: whole Hugging Face tensors without padding, from shards [tp, shard_elements]."""
    pieces = []
    for item, parts in zip(bucket.items, shards.split([i.shard_elements for i in bucket.items], dim=1), strict=True):
        tensors = parameter_map.to_hf(item.entry, [part.reshape(item.shard_shape) for part in parts])
        pieces += [tensors[name].flatten() for name in item.entry.hf_names]
    return torch.cat(pieces)


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
