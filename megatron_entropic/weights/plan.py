"""The publish plan: which parameters travel to the rollout engines together, from which pipeline stage, in what order.

Pure data, a function of the model and the layout alone: every rank computes the same plan without talking to others.
For each bucket, in order:

    ranks of the owner stage:  flat shards --(one all-gather over TP)--> Hugging Face tensors, one flat buffer
    owner stage -> stage 0:    one send, if the owner is another stage
    stage 0 -> engines:        one broadcast
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_entropic.config import Dtype
from megatron_entropic.weights.layouts import Shape
from megatron_entropic.weights.parameter_map import Entry, ParameterMap

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_MIB = 2**20


@dataclass(frozen=True)
class BucketItem:
    """One Megatron parameter in a bucket."""

    entry: Entry
    shard_shape: Shape
    """On every TP rank, vocabulary padding included."""

    @property
    def shard_elements(self) -> int:
        """Elements that each TP rank contributes."""
        return prod(self.shard_shape)

    @property
    def hf_elements(self) -> int:
        """Elements of its Hugging Face tensors."""
        return sum(prod(shape) for shape in self.entry.hf_shapes)


@dataclass(frozen=True)
class Bucket:
    """Parameters of one stage and dtype whose values travel in one flat buffer, in the order of `items`."""

    index: int
    dtype: Dtype
    owner_stage: int
    items: tuple[BucketItem, ...]

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
        """Length of the flat buffer that is broadcast to the engines."""
        return sum(item.hf_elements for item in self.items)

    @property
    def shard_elements(self) -> int:
        """Length of the flat buffer that each TP rank contributes to the all-gather."""
        return sum(item.shard_elements for item in self.items)

    @property
    def bytes(self) -> int:
        """Size of the broadcast buffer."""
        return self.elements * _ITEM_BYTES[self.dtype]

    @property
    def shard_bytes(self) -> int:
        """Size of one TP rank's contribution."""
        return self.shard_elements * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class PublishPlan:
    """All buckets of a model, in the order in which every rank and engine handles them."""

    buckets: tuple[Bucket, ...]
    tensor_parallel: int
    pipeline_parallel: int
    bucket_bytes: int

    @property
    def bytes(self) -> int:
        """What one engine receives."""
        return sum(bucket.bytes for bucket in self.buckets)

    def collectives(self, bucket: Bucket) -> tuple[str, ...]:
        """What happens between processes for one bucket."""
        steps = []
        if self.tensor_parallel > 1:
            steps.append(f"all-gather/{self.tensor_parallel}")
        if bucket.owner_stage > 0:
            steps.append(f"send {bucket.owner_stage}->0")
        return (*steps, "broadcast")

    def describe(self) -> str:
        """The plan as a table for people: bytes per rank and collectives of every bucket."""
        header = ("bucket", "stage", "dtype", "parameters", "HF tensors", "MiB to engines", "MiB per TP rank", "steps")
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
            f"{steps} steps (tensor_parallel={self.tensor_parallel}, pipeline_parallel={self.pipeline_parallel})"
        )
        return "\n".join(lines)


def publish_plan(
    parameter_map: ParameterMap,
    *,
    pipeline_parallel: int,
    tensor_parallel: int,
    bucket_bytes: int,
    dtype: Dtype,
) -> PublishPlan:
    """Divide a model's parameters into buckets of one stage and at most `bucket_bytes` of Hugging Face tensors.

    A parameter is never divided, so one that is larger than `bucket_bytes` travels alone. The output layer of a tied
    model is left out: engines tie it themselves.

    Raises:
        ValueError: a layout that the model does not allow, or bucket_bytes < 1.
    """
    parameter_map.dimensions.check_parallel(tensor_parallel, pipeline_parallel)
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be positive, not {bucket_bytes}")
    buckets: list[Bucket] = []
    for stage in range(pipeline_parallel):
        pending: list[BucketItem] = []
        pending_bytes = 0
        for entry in parameter_map.entries_of_stage(stage, pipeline_parallel):
            if not entry.exported:
                continue
            item = BucketItem(entry, parameter_map.shard_shape(entry, tensor_parallel))
            item_bytes = item.hf_elements * _ITEM_BYTES[dtype]
            if pending and pending_bytes + item_bytes > bucket_bytes:
                buckets.append(Bucket(len(buckets), dtype, stage, tuple(pending)))
                pending, pending_bytes = [], 0
            pending.append(item)
            pending_bytes += item_bytes
        buckets.append(Bucket(len(buckets), dtype, stage, tuple(pending)))
    return PublishPlan(tuple(buckets), tensor_parallel, pipeline_parallel, bucket_bytes)
