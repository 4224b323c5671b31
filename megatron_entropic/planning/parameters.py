"""Parameters of every rank, taken from the weights map, and the buffers that megatron-core makes of them.

A rank's parameters are the map's entries of its pipeline stage, each cut for tensor parallelism. Experts are the one
thing the map does not have yet; `expert_shards` stands for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod
from typing import Any, Literal

from megatron_entropic.config import Dtype, PolicyConfig
from megatron_entropic.planning.models import PlannedModel
from megatron_entropic.weights.parameter_map import Entry, ParameterMap
from megatron_entropic.weights.plan import PublishPlan, publish_plan

Part = Literal["embedding", "layers", "output"]

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
BUCKET_ELEMENTS = 40_000_000
"""megatron-core's DistributedDataParallel closes a bucket of gradients at this size, or at 1,000,000 for each rank."""

_REGISTERED_FIRST = ("input_layernorm", "linear_proj", "linear_qkv", "q_layernorm", "k_layernorm", "pre_mlp_layernorm")
"""Order in which a megatron-core layer registers its modules; the feed-forward part follows. Only which rank owns which
piece of optimizer state depends on it."""


@dataclass(frozen=True)
class ParameterShard:
    """One parameter as a rank holds it."""

    name: str
    part: Part
    elements: int
    """On this rank, vocabulary padding included."""
    expert: bool = False
    shared_embedding: bool = False
    """One of two copies of a tied embedding, on the first and on the last pipeline stage."""


@dataclass(frozen=True)
class StageParameters:
    """What each rank of one pipeline stage holds, in megatron-core's order."""

    stage: int
    layers: int
    shards: tuple[ParameterShard, ...]

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return sum(shard.elements for shard in self.shards)

    def elements_of(self, part: Part) -> int:
        """Of the embedding, of the layers, or of final norm and output layer."""
        return sum(shard.elements for shard in self.shards if shard.part == part)

    @property
    def expert_elements(self) -> int:
        """Of experts, which have data-parallel groups of their own."""
        return sum(shard.elements for shard in self.shards if shard.expert)


class ParameterTable:
    """Parts of one model under any layout; each is worked out once."""

    def __init__(self, model: PlannedModel) -> None:
        self.model = model
        self.map = ParameterMap(model.dimensions)
        self._stages: dict[tuple[int, int, int, int], StageParameters] = {}
        self._buffers: dict[tuple[Any, ...], tuple[GradientBuffer, ...]] = {}
        self._publish_plans: dict[tuple[Any, ...], PublishPlan] = {}

    def stage(self, policy: PolicyConfig, stage: int) -> StageParameters:
        """Parameters of each rank of a pipeline stage; the layout must divide the model (`layout_problems`)."""
        key = self._key(policy, stage)
        if key not in self._stages:
            self._stages[key] = StageParameters(
                stage, self.model.dimensions.num_layers // policy.pipeline_parallel, tuple(self._shards(policy, stage))
            )
        return self._stages[key]

    def stages(self, policy: PolicyConfig) -> tuple[StageParameters, ...]:
        """All stages, first to last."""
        return tuple(self.stage(policy, index) for index in range(policy.pipeline_parallel))

    @cached_property
    def elements(self) -> int:
        """Parameters of the whole model as Hugging Face counts them: no padding, a tied embedding once."""
        dense = sum(prod(shape) for name, shape in self.map.hf_tensors.items() if not self._replaced(name))
        return dense + self.model.dimensions.num_layers * self._expert_layer_elements(self._experts)

    @cached_property
    def active_elements(self) -> int:
        """Parameters that one token is multiplied with: a few experts of each layer, the output layer, no embedding."""
        dimensions, experts = self.model.dimensions, self.model.experts
        embedding = dimensions.vocab_size * dimensions.hidden_size
        idle = self._expert_layer_elements(self._experts) - self._expert_layer_elements(
            experts.per_token if experts else 0
        )
        # A tied embedding is the output layer too, and counted once in `elements`.
        lookup = 0 if dimensions.tie_word_embeddings else embedding
        return self.elements - lookup - dimensions.num_layers * idle

    def buffers(self, policy: PolicyConfig, stage: int, *, overlap: bool) -> tuple[GradientBuffer, ...]:
        """The buffers of each rank of a stage: of dense parameters, and of experts if it has any.

        Args:
            policy: the layout.
            stage: from 0.
            overlap: gradients travel during backward, as on a GPU; then the first stage has buckets.
        """
        dense_ranks = policy.data_parallel * policy.context_parallel
        parameters = self.stage(policy, stage)
        limit = max(BUCKET_ELEMENTS, 1_000_000 * dense_ranks) if overlap and stage == 0 else None
        key = (self._key(policy, stage), dense_ranks, policy.distributed_optimizer, limit)
        if key not in self._buffers:
            groups = (
                (dense_ranks, [shard for shard in parameters.shards if not shard.expert]),
                (max(1, dense_ranks // policy.expert_parallel), [shard for shard in parameters.shards if shard.expert]),
            )
            self._buffers[key] = tuple(
                gradient_buffer(
                    group, data_ranks=ranks, distributed=policy.distributed_optimizer, bucket_elements=limit
                )
                for ranks, group in groups
                if group
            )
        return self._buffers[key]

    def publish_plan(self, policy: PolicyConfig, dtype: Dtype, bucket_bytes: int) -> PublishPlan:
        """`weights.plan.publish_plan` of a layout."""
        key = (policy.tensor_parallel, policy.pipeline_parallel, dtype, bucket_bytes)
        if key not in self._publish_plans:
            self._publish_plans[key] = publish_plan(
                self.map,
                tensor_parallel=policy.tensor_parallel,
                pipeline_parallel=policy.pipeline_parallel,
                bucket_bytes=bucket_bytes,
                dtype=dtype,
            )
        return self._publish_plans[key]

    def _key(self, policy: PolicyConfig, stage: int) -> tuple[int, int, int, int]:
        return policy.tensor_parallel, policy.pipeline_parallel, policy.expert_parallel, stage

    @property
    def _experts(self) -> int:
        return self.model.experts.count if self.model.experts else 0

    def _expert_layer_elements(self, experts: int) -> int:
        """Of that many experts of one layer, with the router, which always has all columns."""
        if self.model.experts is None:
            return 0
        hidden = self.model.dimensions.hidden_size
        return 3 * experts * hidden * self.model.experts.ffn_hidden_size + self._experts * hidden

    def _replaced(self, name: str) -> bool:
        """Whether an entry of the dense map stands where this model has experts."""
        return self.model.experts is not None and ".mlp." in name

    def _shards(self, policy: PolicyConfig, stage: int) -> Iterator[ParameterShard]:
        entries = self.map.entries_of_stage(stage, policy.pipeline_parallel)
        kept = [entry for entry in entries if not self._replaced(entry.megatron_name)]
        first, last = self.map.entries[0].megatron_name, self.map.entries[-1].megatron_name
        tied = self.model.dimensions.tie_word_embeddings and policy.pipeline_parallel > 1
        yield from (
            ParameterShard(
                entry.megatron_name,
                "layers" if entry.layer is not None else "embedding" if entry.megatron_name == first else "output",
                prod(self.map.shard_shape(entry, policy.tensor_parallel)),
                shared_embedding=tied and entry.megatron_name in (first, last),
            )
            for entry in sorted(kept, key=_registration)
        )
        if self.model.experts is not None:
            for layer in sorted({entry.layer for entry in kept if entry.layer is not None}):
                yield from expert_shards(self.model, policy, layer)


def _registration(entry: Entry) -> tuple[int, int]:
    """Sorts entries of a stage as megatron-core registers them; the sort keeps the map's order otherwise."""
    if entry.layer is None:
        return (-1 if entry.megatron_name.startswith("embedding") else 1 << 30, 0)
    place = next((i for i, name in enumerate(_REGISTERED_FIRST) if f".{name}." in entry.megatron_name), 99)
    return entry.layer, place


def expert_parallel_shards(policy: PolicyConfig) -> int:
    """Ranks of a pipeline stage over which one layer's experts are spread: TP x EP.

    megatron-core gives experts the tensor-parallel size of the rest unless told otherwise (parallel_state).
    """
    return policy.tensor_parallel * policy.expert_parallel


def expert_shards(model: PlannedModel, policy: PolicyConfig, layer: int) -> tuple[ParameterShard, ...]:
    """Router and experts of one layer on one rank; to be replaced by the weights map once it has experts.

    Router [experts, H] on every rank; each of experts / EP local experts has gate and up [2 F / TP, H] and down
    [H, F / TP].
    """
    assert model.experts is not None
    hidden, experts = model.dimensions.hidden_size, model.experts
    matrix = hidden * experts.count * experts.ffn_hidden_size // expert_parallel_shards(policy)
    prefix = f"decoder.layers.{layer}.mlp."
    return (
        ParameterShard(f"{prefix}router.weight", "layers", experts.count * hidden),
        ParameterShard(f"{prefix}experts.linear_fc1.weight", "layers", 2 * matrix, expert=True),
        ParameterShard(f"{prefix}experts.linear_fc2.weight", "layers", matrix, expert=True),
    )


@dataclass(frozen=True)
class GradientBuffer:
    """megatron-core's flat buffer of a rank's gradients (and parameters, under the distributed optimizer)."""

    ranges: tuple[tuple[int, int], ...]
    """Begin and end of every parameter, in elements."""
    bucket_of: tuple[int, ...]
    """Index of each parameter's bucket."""
    buckets: tuple[tuple[int, int], ...]
    """Begin and end of every bucket; each is summed over data-parallel ranks, and divided among them."""
    data_ranks: int
    distributed: bool

    @property
    def padded_elements(self) -> int:
        """Length of the buffer."""
        return self.buckets[-1][1] if self.buckets else 0

    @property
    def elements(self) -> int:
        """Of the parameters alone."""
        return sum(end - begin for begin, end in self.ranges)

    def owned_elements(self, data_rank: int) -> int:
        """Elements whose optimizer state a data-parallel rank keeps: its equal part of every bucket, less padding."""
        if not self.distributed:
            return self.elements
        owned = 0
        for (begin, end), bucket in zip(self.ranges, self.bucket_of, strict=True):
            bucket_begin, bucket_end = self.buckets[bucket]
            part = (bucket_end - bucket_begin) // self.data_ranks
            low = bucket_begin + data_rank * part
            owned += max(0, min(end, low + part) - max(begin, low))
        return owned


def gradient_buffer(
    shards: Sequence[ParameterShard], *, data_ranks: int, distributed: bool, bucket_elements: int | None
) -> GradientBuffer:
    """The buffer of some parameters, given in megatron-core's order.

    The rule is that of megatron-core 0.16 to 0.19 (distributed/param_and_grad_buffer): parameters lie in reverse order.
    Under the distributed optimizer each begins at a multiple of 64 elements, each bucket ends at a multiple of 128 and
    of the number of ranks, and a copy of a tied embedding has a bucket of its own.

    Args:
        shards: of one rank.
        data_ranks: ranks that hold the same parameters (data x context parallel).
        distributed: policy.distributed_optimizer.
        bucket_elements: size at which a bucket is closed; None: never.
    """
    ranges: list[tuple[int, int]] = []
    bucket_of: list[int] = []
    buckets: list[tuple[int, int]] = []
    bucket_begin, end = 0, 0

    def close() -> int:
        bucket_end = _padded(end, lcm(data_ranks, 128)) if distributed else end
        buckets.append((bucket_begin, bucket_end))
        return bucket_end

    for shard in reversed(shards):
        begin = _padded(end, 64) if distributed else end
        alone = shard.shared_embedding and distributed
        if alone and begin > bucket_begin:
            end = begin
            begin = bucket_begin = close()
        end = begin + shard.elements
        ranges.append((begin, end))
        bucket_of.append(len(buckets))
        if alone or (bucket_elements is not None and end - bucket_begin >= bucket_elements):
            end = bucket_begin = close()
    if end > bucket_begin:
        close()
    return GradientBuffer(tuple(ranges), tuple(bucket_of), tuple(buckets), data_ranks, distributed)


def _padded(elements: int, multiple: int) -> int:
    return -(-elements // multiple) * multiple
