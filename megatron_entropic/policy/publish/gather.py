"""Gathers parameters spread over tensor and pipeline ranks to whole Hugging Face tensors, one flat bucket at a time.

owner stage:    shards of a bucket, flat --one gather over TP--> unshard --> Hugging Face tensors, flat
                experts: over expert TP x EP instead; where the ranks share memory, each writes its part of them
                --one send--> first stage, unless each stage's own first tensor rank is where they are wanted
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_entropic.config.policy import LoraConfig
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.policy.megatron.parallel import ParallelState
from megatron_entropic.policy.model.adapters import MergedValues, adapter_entries, named_adapters
from megatron_entropic.policy.model.load import named_entries
from megatron_entropic.policy.model.transformer_config import DTYPES
from megatron_entropic.policy.publish.shared_flats import SharedFlats
from megatron_entropic.weight_sync.gloo import FlatContents, named_wait
from megatron_entropic.weight_sync.plan import Bucket, BucketItem, PublishPlan


class Workspace:
    """Buffers of a pass over many buckets, one for each purpose, taken again for the next bucket.

    On a CPU fresh memory costs a page fault every 4 KiB, which takes longer than what is done with it here.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self.shared: dict[bool, SharedFlats] = {}
        """Buffers that all ranks of a gathering write to, if they can, for buckets of experts (True) and dense ones."""

    def take(self, purpose: str, elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Tensor [elements] with arbitrary values, valid until the next call with the same purpose."""
        buffer = self._buffers.get(purpose)
        nbytes = elements * dtype.itemsize
        if buffer is None or buffer.numel() < nbytes or buffer.device != device:
            buffer = self._buffers[purpose] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return buffer[:nbytes].view(dtype)

    def release(self) -> None:
        """Give all memory back."""
        self._buffers.clear()


def sends_weights(parallel: ParallelState) -> bool:
    """Whether this rank takes part in a gather: of those that hold the same parameters, the first one sends."""
    return any(takes_part(parallel, of_experts=of_experts) for of_experts in (False, True))


def takes_part(parallel: ParallelState, *, of_experts: bool) -> bool:
    """Whether this rank's copy of its stage's experts, or of the rest, is the one that is gathered."""
    if of_experts:
        return parallel.expert_data_rank == 0
    return parallel.data_rank == 0 and parallel.context_rank == 0


def peers(*, of_experts: bool) -> str:
    """Words for the ranks with which a rank gathers, for messages."""
    return "the expert-parallel ranks of its stage" if of_experts else "the tensor ranks of its stage"


@dataclass(frozen=True)
class RankWeights:
    """The parameters that this rank holds, and the plan by which all ranks bring theirs together."""

    model: torch.nn.ModuleList
    """Chunks of this rank's stage, not wrapped."""
    plan: PublishPlan
    """Buckets in which parameters are gathered, and their dtype."""
    parameter_map: ParameterMap
    parallel: ParallelState

    def values(self) -> Mapping[str, torch.Tensor]:
        """Shards of this rank by global Megatron name, with adapters merged into them where there are some."""
        entries = named_entries(self.model, self.parameter_map, self.parallel)
        values = {entry.megatron_name: parameter for entry, parameter in entries}
        adapters = dict(named_adapters(self.model, self.parameter_map.dimensions.num_layers, self.parallel))
        return MergedValues(values, adapters) if adapters else values

    def gathered(self, phase: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the whole model on rank 0; see `gather_hf_tensors`."""
        return gather_hf_tensors(self.plan, self.values(), self.parameter_map, self.parallel, phase)


@dataclass(frozen=True)
class AdapterWeights(RankWeights):
    """The adapters' matrices that this rank holds, by `models.adapters.adapter_map`, in a plan of their own."""

    lora: LoraConfig

    def values(self) -> Mapping[str, torch.Tensor]:
        """Shards of this rank by global Megatron name."""
        entries = adapter_entries(self.model, self.parameter_map, self.parallel)
        return {entry.megatron_name: parameter for entry, parameter in entries}


@dataclass
class BucketGathering:
    """A pass over buckets, in which each is brought to one rank; all ranks for which `sends_weights` holds make it."""

    parameter_map: ParameterMap
    parallel: ParallelState
    phase: str
    """Words for what the run is doing, for messages."""
    workspace: Workspace = field(default_factory=Workspace)

    def bring(
        self, bucket: Bucket, values: Mapping[str, torch.Tensor], *, to_first_stage: bool = True
    ) -> torch.Tensor | None:
        """Bring one bucket, of the plan that all ranks share, to one rank.

        Args:
            values: this rank's shards by global Megatron name.
            to_first_stage: whether to bring it to rank 0; otherwise it stays on the first tensor rank of its own stage.

        Returns:
            [bucket.elements] of the bucket's dtype on that rank, in the order of `bucket.hf_names`, in the workspace:
            its memory is taken again for the bucket after the next. None on other ranks.

        Raises:
            PhaseTimeout, PeerDied: naming bucket, this rank and its peers.
        """
        parallel, flat = self.parallel, None
        where = f"{self.phase}: bucket {bucket.index} ({bucket.items[0].entry.megatron_name} ..)"
        if parallel.pipeline_rank == bucket.owner_stage and takes_part(parallel, of_experts=bucket.of_experts):
            with named_wait(where, f"policy {parallel.describe()}", peers(of_experts=bucket.of_experts)):
                flats = self.workspace.shared.get(bucket.of_experts)
                if flats is not None:
                    whole = self._write_together(bucket, values, flats)
                    flat = whole if parallel.is_first_of_stage else None
                elif (shards := self._gather_shards(bucket, values)) is not None:
                    flat = self._join(bucket, shards)
        if not to_first_stage or bucket.owner_stage == 0 or not parallel.is_first_of_stage:
            return flat
        return self._send_to_first_stage(bucket, flat, values, where)

    def _gather_shards(self, bucket: Bucket, values: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Gather every rank's part in one collective: [ranks, shard_elements] on the stage's first rank."""
        parallel, workspace = self.parallel, self.workspace
        dtype, device = DTYPES[bucket.dtype], next(iter(values.values())).device
        group = parallel.expert_group if bucket.of_experts else parallel.tensor_group
        gathered = None
        if parallel.is_first_of_stage:
            size = group.size() * bucket.shard_elements
            gathered = workspace.take("gathered", size, dtype, device).view(group.size(), -1)
        mine = workspace.take("mine", bucket.shard_elements, dtype, device) if gathered is None else gathered[0]
        held = [values[item.entry.megatron_name].detach() for item in bucket.held_by(parallel.expert_rank)]
        for part, shard in zip(mine.split([value.numel() for value in held]), held, strict=True):
            part.copy_(shard.flatten())
        if group.size() > 1:
            parts = None if gathered is None else list(gathered)
            dist.gather(mine, parts, dst=dist.get_global_rank(group, 0), group=group)
        return gathered

    def _join(self, bucket: Bucket, shards: torch.Tensor) -> torch.Tensor:
        """Join shards [ranks, shard_elements] into whole Hugging Face tensors without padding, [bucket.elements]."""
        flat = self.workspace.take(f"flat {bucket.index % 2}", bucket.elements, shards.dtype, shards.device)
        owners = 1 + max(item.expert_rank for item in bucket.items)
        for owner, of_owner in enumerate(shards.unflatten(0, (owners, -1))):
            held = bucket.held_by(owner)
            for tensor_rank, shard in enumerate(of_owner):
                parts = shard.split([item.shard_elements for item in held])
                values = [part.view(item.shard_shape) for item, part in zip(held, parts, strict=True)]
                self._write_part(flat, bucket, held, values, (tensor_rank, of_owner.shape[0]))
        return flat

    def _write_together(self, bucket: Bucket, values: Mapping[str, torch.Tensor], flats: SharedFlats) -> torch.Tensor:
        """Flat buffer [bucket.elements] in memory that all these ranks see, each part written by its rank."""
        flat = flats.take(bucket.index % 2, bucket.elements, DTYPES[bucket.dtype])
        flats.wait_for_all()  # the first rank comes when the memory is free
        held = bucket.held_by(self.parallel.expert_rank)
        own = [values[item.entry.megatron_name].detach() for item in held]
        self._write_part(flat, bucket, held, own, self.parallel.tensor_place(of_expert=bucket.of_experts))
        flats.wait_for_all()
        return flat

    def _write_part(
        self,
        flat: torch.Tensor,
        bucket: Bucket,
        held: Sequence[BucketItem],
        values: Sequence[torch.Tensor],
        tensor_place: tuple[int, int],
    ) -> None:
        """Write one rank's parameters to their places in the bucket's flat buffer [bucket.elements]."""
        tensors = dict(FlatContents.of_bucket(bucket).split(flat))
        for item, value in zip(held, values, strict=True):
            self.parameter_map.write_to_hf(item.entry, value, tensors, *tensor_place)

    def _send_to_first_stage(
        self, bucket: Bucket, flat: torch.Tensor | None, values: Mapping[str, torch.Tensor], where: str
    ) -> torch.Tensor | None:
        """Send a bucket from its owner stage to the first; stages that are neither only pass by."""
        parallel, group = self.parallel, self.parallel.pipeline_group
        if parallel.pipeline_rank == bucket.owner_stage:
            assert flat is not None
            first = dist.get_global_rank(group, 0)
            with named_wait(where, f"policy {parallel.describe()}", f"policy rank {first}, to which it sends"):
                dist.send(flat, dst=first, group=group)
            return None
        if not parallel.is_first_stage:
            return None
        owner = dist.get_global_rank(group, bucket.owner_stage)
        device = next(iter(values.values())).device
        received = self.workspace.take(f"flat {bucket.index % 2}", bucket.elements, DTYPES[bucket.dtype], device)
        with named_wait(where, f"policy {parallel.describe()}", f"policy rank {owner}, which owns the bucket"):
            dist.recv(received, src=owner, group=group)
        return received


def gather_hf_tensors(
    plan: PublishPlan,
    values: Mapping[str, torch.Tensor],
    parameter_map: ParameterMap,
    parallel: ParallelState,
    phase: str,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields names and tensors of the whole model on rank 0, in plan order; nothing on other ranks.

    All ranks for which `sends_weights` holds must exhaust it. A tensor is a view of its bucket's buffer, which holds
    it until the next but one bucket begins: copy what is kept.
    """
    gathering = BucketGathering(parameter_map, parallel, phase)
    for bucket in plan.buckets:
        flat = gathering.bring(bucket, values)
        if flat is not None:
            yield from FlatContents.of_bucket(bucket).split(flat)
