"""The publish plan: which parameters travel to the rollout engines together, from which pipeline stage, in what order.

Pure data, a function of the model and the layout alone: every rank computes the same plan without talking to others.
For each bucket, in order:

    ranks of the owner stage:  flat shards --(one gather over TP)--> Hugging Face tensors, one flat buffer
                               experts: over expert TP x EP instead
    owner stage -> stage 0:    one send, if the owner is another stage
    stage 0 -> engines:        one broadcast

Over gloo the second step falls away: every stage broadcasts its own buckets, at the same time as the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.config.run import ITEM_BYTES, Dtype
from megatron_entropic.models.layouts import Shape
from megatron_entropic.models.parameter_map import Entry, ParameterMap
from megatron_entropic.models.stages import StageSizes

_MIB = 2**20


@dataclass(frozen=True)
class BucketItem:
    """One Megatron parameter in a bucket."""

    entry: Entry
    shard_shape: Shape
    """Shape of the parameter on every TP rank, vocabulary padding included."""
    expert_rank: int = 0
    """Expert-parallel rank that holds the parameter; 0 for dense parameters."""

    @property
    def shard_elements(self) -> int:
        """Number of elements that each TP rank contributes."""
        return prod(self.shard_shape)

    @property
    def hf_elements(self) -> int:
        """Number of elements of the parameter's Hugging Face tensors."""
        return sum(prod(shape) for shape in self.entry.hf_shapes)


@dataclass(frozen=True)
class Bucket:
    """Parameters of one stage and dtype whose values travel in one flat buffer, in the order of `items`.

    They are dense, or experts. Each expert-parallel rank then holds equally many, of the same shapes in the same order.
    """

    index: int
    dtype: Dtype
    owner_stage: int
    items: tuple[BucketItem, ...]

    @property
    def of_experts(self) -> bool:
        """Whether the bucket is gathered over expert tensor and expert-parallel ranks."""
        return self.items[0].entry.expert is not None

    def held_by(self, expert_rank: int) -> tuple[BucketItem, ...]:
        """Items that the ranks of one expert-parallel rank contribute; all, if the bucket is dense."""
        return tuple(item for item in self.items if not self.of_experts or item.expert_rank == expert_rank)

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors in the order in which the flat buffer holds them."""
        return tuple(name for item in self.items for name in item.entry.hf_names)

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """Shapes of `hf_names`."""
        return tuple(shape for item in self.items for shape in item.entry.hf_shapes)

    @property
    def elements(self) -> int:
        """Length of the flat buffer that is broadcast to the engines, in elements."""
        return sum(item.hf_elements for item in self.items)

    @property
    def shard_elements(self) -> int:
        """Length of the flat buffer that each rank contributes to the gathering, in elements."""
        return sum(item.shard_elements for item in self.held_by(0))

    @property
    def bytes(self) -> int:
        """Size of the broadcast buffer, in bytes."""
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def shard_bytes(self) -> int:
        """Size of one rank's contribution, in bytes."""
        return self.shard_elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class PublishPlan:
    """All buckets of a model, in the order in which every rank and engine handles them."""

    buckets: tuple[Bucket, ...]
    tensor_parallel: int
    pipeline_parallel: int
    bucket_bytes: int
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1

    @property
    def bytes(self) -> int:
        """Bytes that one engine receives."""
        return sum(bucket.bytes for bucket in self.buckets)

    def gather_ranks(self, bucket: Bucket) -> int:
        """Number of ranks that together hold a bucket's parameters."""
        if bucket.of_experts:
            return self.expert_tensor_parallel * self.expert_parallel
        return self.tensor_parallel

    def collectives(self, bucket: Bucket) -> tuple[str, ...]:
        """Names of the transfers between processes for one bucket, in order."""
        steps = []
        if self.gather_ranks(bucket) > 1:
            steps.append(f"gather/{self.gather_ranks(bucket)}")
        if bucket.owner_stage > 0:
            steps.append(f"send {bucket.owner_stage}->0")
        return (*steps, "broadcast")

    def describe(self) -> str:
        """The plan as a table for people: bytes per rank and collectives of every bucket."""
        header = ("bucket", "stage", "dtype", "parameters", "HF tensors", "MiB to engines", "MiB per rank", "steps")
        rows = [header]
        for bucket in self.buckets:
            rows.append(
                (
                    str(bucket.index),
                    str(bucket.owner_stage),
                    bucket.dtype,
                    str(len(bucket.items)),
                    str(len(bucket.hf_names)),
                    f"{bucket.bytes / _MIB:.1f}",
                    f"{bucket.shard_bytes / _MIB:.1f}",
                    " + ".join(self.collectives(bucket)),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        steps = sum(len(self.collectives(bucket)) for bucket in self.buckets)
        limit, total = self.bucket_bytes / _MIB, self.bytes / _MIB
        lines.append(
            f"{len(self.buckets)} buckets of at most {limit:.1f} MiB or one parameter, {total:.1f} MiB to each engine, "
            f"{steps} steps ({', '.join(self._layout())})"
        )
        return "\n".join(lines)

    def _layout(self) -> list[str]:
        sizes = [f"tensor_parallel={self.tensor_parallel}", f"pipeline_parallel={self.pipeline_parallel}"]
        if any(bucket.of_experts for bucket in self.buckets):
            sizes.append(f"expert_parallel={self.expert_parallel}")
            sizes.append(f"expert_tensor_parallel={self.expert_tensor_parallel}")
        return sizes


def publish_plan(parameter_map: ParameterMap, layout: PolicyConfig, *, bucket_bytes: int, dtype: Dtype) -> PublishPlan:
    """Divide a model's parameters into buckets of one stage and at most `bucket_bytes` of Hugging Face tensors.

    A parameter is never divided, so one that is larger than `bucket_bytes` travels alone; nor are parameters of experts
    that stand at the same place of their expert-parallel ranks, which are gathered together. The output layer of a tied
    model is left out: engines tie it themselves. Buffers travel apart, in float32.

    Args:
        layout: sizes of tensor, pipeline, virtual pipeline and expert parallelism.
        bucket_bytes: limit of one bucket.
        dtype: dtype of the parameters as they travel.

    Raises:
        UserError: a layout that the model does not allow.
        ValueError: bucket_bytes < 1.
    """
    tensor_parallel, pipeline_parallel = layout.tensor_parallel, layout.pipeline_parallel
    expert_parallel, expert_tensor = layout.expert_parallel, layout.expert_tensor_size
    parameter_map.dimensions.check_parallel(
        tensor_parallel,
        StageSizes.of(layout),
        expert_parallel=expert_parallel,
        expert_tensor_parallel=layout.expert_tensor_parallel,
    )
    stages = parameter_map.dimensions.pipeline_stages(layout)
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be positive, not {bucket_bytes}")
    buckets: list[Bucket] = []
    for stage in range(pipeline_parallel):
        held = parameter_map.entries_of_stage(stage, stages)
        entries = [entry for entry in held if entry.exported]
        contents: tuple[tuple[list[tuple[BucketItem, ...]], Dtype], ...] = (
            (_whole_units(parameter_map, entries, tensor_parallel, of_buffers=False), dtype),
            (_expert_units(parameter_map, entries, expert_parallel, expert_tensor), dtype),
            (_whole_units(parameter_map, entries, tensor_parallel, of_buffers=True), "float32"),
        )
        for units, unit_dtype in contents:
            for items in _fill(units, bucket_bytes, ITEM_BYTES[unit_dtype]):
                buckets.append(Bucket(len(buckets), unit_dtype, stage, items))
    return PublishPlan(tuple(buckets), tensor_parallel, pipeline_parallel, bucket_bytes, expert_parallel, expert_tensor)


def _whole_units(
    parameter_map: ParameterMap, entries: Sequence[Entry], tensor_parallel: int, *, of_buffers: bool
) -> list[tuple[BucketItem, ...]]:
    """Units of parameters, or of buffers, that do not belong to experts, each on its own."""
    wanted = [entry for entry in entries if entry.expert is None and entry.buffer == of_buffers]
    return [(BucketItem(entry, parameter_map.shard_shape(entry, tensor_parallel)),) for entry in wanted]


def _expert_units(
    parameter_map: ParameterMap, entries: Sequence[Entry], expert_parallel: int, expert_tensor_parallel: int
) -> list[tuple[BucketItem, ...]]:
    """Units of parameters of experts, those at the same place of all expert-parallel ranks together."""
    units: dict[tuple[int | None, int, str], list[BucketItem]] = {}
    for entry in entries:
        if entry.expert is None:
            continue
        rank = parameter_map.expert_rank(entry, expert_parallel)
        local = entry.expert - parameter_map.first_expert(rank, expert_parallel)
        matrix = entry.megatron_name.rpartition(f".{entry.expert}.")[2]
        item = BucketItem(entry, parameter_map.shard_shape(entry, expert_tensor_parallel), rank)
        units.setdefault((entry.layer, local, matrix), []).append(item)
    return [tuple(items) for items in units.values()]


def _fill(
    units: Sequence[tuple[BucketItem, ...]], bucket_bytes: int, item_bytes: int
) -> Iterator[tuple[BucketItem, ...]]:
    """Yields runs of whole units of at most `bucket_bytes`, or one unit."""
    pending: list[BucketItem] = []
    pending_bytes = 0
    for unit in units:
        unit_bytes = sum(item.hf_elements for item in unit) * item_bytes
        if pending and pending_bytes + unit_bytes > bucket_bytes:
            yield tuple(pending)
            pending, pending_bytes = [], 0
        pending += unit
        pending_bytes += unit_bytes
    if pending:
        yield tuple(pending)
