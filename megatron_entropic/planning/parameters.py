"""Parameters of every rank, taken from the weights map, and the buffers that megatron-core makes of them.

A rank's parameters are the map's entries of its pipeline stage, of experts those of its expert-parallel rank, each cut
for tensor parallelism.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod
from pathlib import Path
from typing import Any, Literal

from megatron_entropic.config.algorithm import AlgorithmConfig, FrozenName
from megatron_entropic.config.policy import LoraConfig, PolicyConfig
from megatron_entropic.config.run import Dtype
from megatron_entropic.errors import UserError
from megatron_entropic.files.jsonl import read_json_object
from megatron_entropic.models.adapters import adapter_map
from megatron_entropic.models.dimensions import ModelDimensions, read_dimensions
from megatron_entropic.models.parameter_map import Entry, ParameterMap
from megatron_entropic.models.read_config import ExpertDimensions
from megatron_entropic.weight_sync.plan import PublishPlan, publish_plan

# The model to plan for, from a config.json alone: a model directory, a file, or the published sizes shipped here.

KNOWN_MODELS = Path(__file__).parent / "model_configs"
"""One file for each model, NAME.json, with the dimensions of its published config.json."""


@dataclass(frozen=True)
class PlannedModel:
    """Sizes of a model and where they were found."""

    name: str
    dimensions: ModelDimensions
    source: str

    @property
    def experts(self) -> ExpertDimensions | None:
        """Sizes of the experts, the same in every layer that has some; None for a dense model."""
        return self.dimensions.experts

    @property
    def feed_forward_width(self) -> int:
        """Width of the feed-forward part of a dense model's layer, or of one expert."""
        return self.experts.ffn_hidden_size if self.experts else self.dimensions.ffn_hidden_size


def find_model(hf_dir: Path, model_config: Path | None = None) -> PlannedModel:
    """The model of a configuration.

    Args:
        hf_dir: `model.hf_dir`. If it holds a config.json, that one counts; if not, a known model whose name the
            directory's name begins with (Qwen3-8B-Base has the sizes of Qwen3-8B).
        model_config: a config.json to take instead.

    Raises:
        UserError: no such file, no known model of that name, or a model that cannot be planned for.
    """
    if model_config is not None:
        return read_model(model_config, model_config.stem if model_config.stem != "config" else hf_dir.name)
    if (hf_dir / "config.json").is_file():
        return read_model(hf_dir / "config.json", hf_dir.name)
    known = {path.stem: path for path in sorted(KNOWN_MODELS.glob("*.json"))}
    matches = [name for name in known if hf_dir.name.lower().startswith(name.lower())]
    if not matches:
        raise UserError(
            f"model.hf_dir={hf_dir}: no config.json in it, and {hf_dir.name!r} is not the name of a known model "
            f"({', '.join(known)}); give its config.json with --model-config"
        )
    return read_model(known[max(matches, key=len)], hf_dir.name)


def read_model(path: Path, name: str) -> PlannedModel:
    """The model that a config.json describes.

    Raises:
        UserError: not readable, or a model that cannot be planned for; all reasons in one message.
    """
    return PlannedModel(name, _dimensions(read_json_object(path), path), str(path))


def _dimensions(config: dict[str, Any], path: Path) -> ModelDimensions:
    """Read the dimensions (`read_dimensions`) of a configuration that is not in a model directory of its own."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "config.json"
        copy.write_text(json.dumps(config), encoding="utf-8")
        try:
            return read_dimensions(copy.parent)
        except ValueError as error:
            raise UserError(str(error).replace(str(copy), str(path))) from error


Part = Literal["embedding", "layers", "output"]

BUCKET_ELEMENTS = 40_000_000
"""megatron-core's DistributedDataParallel closes a bucket of gradients at this size, or at 1,000,000 for each rank."""

_REGISTERED_FIRST = (
    "input_layernorm",
    "linear_proj",
    "linear_qkv",
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
    "linear_kv_up_proj",
    "q_layernorm",
    "kv_layernorm",
    "k_layernorm",
    "pre_mlp_layernorm",
)
"""Order in which a megatron-core layer registers its modules; the feed-forward part follows. Only which rank owns which
piece of optimizer state depends on it."""


@dataclass(frozen=True)
class ParameterShard:
    """One parameter as a rank holds it."""

    name: str
    part: Part
    elements: int
    """Number of elements on this rank, vocabulary padding included."""
    expert: bool = False
    shared_embedding: bool = False
    """One of two copies of a tied embedding, on the first and on the last pipeline stage."""
    chunk: int = 0
    """Index of the stage's chunk that has the parameter; chunks have buffers of their own."""


@dataclass(frozen=True)
class StageParameters:
    """Parameters that each rank of one pipeline stage holds, in megatron-core's order."""

    stage: int
    layers: int
    shards: tuple[ParameterShard, ...]

    @property
    def elements(self) -> int:
        """Number of elements of all parameters."""
        return sum(shard.elements for shard in self.shards)

    def elements_of(self, part: Part) -> int:
        """Number of elements of the embedding, of the layers, or of final norm and output layer."""
        return sum(shard.elements for shard in self.shards if shard.part == part)

    @property
    def expert_elements(self) -> int:
        """Number of elements of experts, which have data-parallel groups of their own."""
        return sum(shard.elements for shard in self.shards if shard.expert)


class ParameterTable:
    """Parameters of every rank of one model under any layout; each part is worked out once.

    Args:
        parameter_map: its parameters, where they are known already.
        beside: tables of the frozen models that are held beside it and have sizes of their own.
    """

    def __init__(
        self,
        model: PlannedModel,
        parameter_map: ParameterMap | None = None,
        beside: Mapping[FrozenName, ParameterTable] | None = None,
    ) -> None:
        self.model = model
        self.beside = dict(beside or {})
        self.map = ParameterMap(model.dimensions) if parameter_map is None else parameter_map
        self._stages: dict[tuple[int, ...], StageParameters] = {}
        self._buffers: dict[tuple[Any, ...], tuple[GradientBuffer, ...]] = {}
        self._publish_plans: dict[tuple[Any, ...], PublishPlan] = {}
        self._adapters: dict[tuple[Any, ...], ParameterTable] = {}

    def frozen(self, algorithm: AlgorithmConfig) -> dict[FrozenName, ParameterTable]:
        """Tables of the frozen models that the algorithm asks for; of the model itself where nothing else is known."""
        return {name: self.beside.get(name, self) for name in algorithm.frozen_dirs}

    def trained(self, lora: LoraConfig) -> ParameterTable:
        """The table of what is trained: the model itself, or its adapters."""
        if not lora.enabled:
            return self
        key = (lora.rank, *lora.target_modules)
        if key not in self._adapters:
            self._adapters[key] = ParameterTable(self.model, adapter_map(self.map, lora))
        return self._adapters[key]

    def stage(self, policy: PolicyConfig, stage: int) -> StageParameters:
        """Parameters of each rank of a pipeline stage; the layout must divide the model (`layout_problems`)."""
        key = self._key(policy, stage)
        if key not in self._stages:
            self._stages[key] = StageParameters(
                stage, self.model.dimensions.pipeline_stages(policy).layers[stage], tuple(self._shards(policy, stage))
            )
        return self._stages[key]

    def stages(self, policy: PolicyConfig) -> tuple[StageParameters, ...]:
        """Parameters of all stages, first to last."""
        return tuple(self.stage(policy, index) for index in range(policy.pipeline_parallel))

    @cached_property
    def elements(self) -> int:
        """Number of parameters of the whole model as Hugging Face counts them: no padding, a tied embedding once."""
        return sum(prod(shape) for name, shape in self.map.hf_tensors.items() if name not in self.map.buffers)

    @cached_property
    def active_elements(self) -> int:
        """Parameters that one token is multiplied with: a few experts of each layer, the output layer, no embedding."""
        dimensions, experts = self.model.dimensions, self.model.experts
        embedding = dimensions.vocab_size * dimensions.hidden_size
        idle = (
            3 * dimensions.hidden_size * experts.ffn_hidden_size * (experts.count - experts.per_token) if experts else 0
        )
        # A tied embedding is the output layer too, and counted once in `elements`.
        lookup = 0 if dimensions.tie_word_embeddings else embedding
        return self.elements - lookup - dimensions.sparse_layers * idle

    def buffers(self, policy: PolicyConfig, stage: int, *, overlap: bool) -> tuple[GradientBuffer, ...]:
        """The buffers of each rank of a stage: for each chunk of dense parameters, and of experts if it has any.

        With adapters, of theirs alone.

        Args:
            stage: number of the pipeline stage, from 0.
            overlap: whether gradients travel during backward, as on a GPU; then the first stage has buckets.
        """
        dense_ranks = policy.data_parallel * policy.context_parallel
        parameters = self.trained(policy.lora).stage(policy, stage)
        limit = max(BUCKET_ELEMENTS, 1_000_000 * dense_ranks) if overlap and stage == 0 else None
        adapters = (policy.lora.rank, *policy.lora.target_modules)
        key = (self._key(policy, stage), dense_ranks, policy.distributed_optimizer, limit, adapters)
        if key not in self._buffers:
            # Experts that every rank holds are summed with the rest.
            apart = policy.expert_parallel > 1
            groups = [
                (expert, chunk, [s for s in parameters.shards if s.chunk == chunk and (apart and s.expert) == expert])
                for chunk in range(policy.virtual_pipeline_parallel)
                for expert in (False, True)
            ]
            # The gradients of all chunks but the first travel in one piece.
            self._buffers[key] = tuple(
                gradient_buffer(
                    group,
                    expert=expert,
                    data_ranks=policy.expert_replicas if expert else dense_ranks,
                    distributed=policy.distributed_optimizer,
                    bucket_elements=limit if chunk == 0 else None,
                )
                for expert, chunk, group in groups
                if group
            )
        return self._buffers[key]

    def publish_plan(self, policy: PolicyConfig, dtype: Dtype, bucket_bytes: int) -> PublishPlan:
        """Plan of a publication (`weight_sync.plan.publish_plan`) under a layout."""
        key = (*self._key(policy, 0), dtype, bucket_bytes)
        if key not in self._publish_plans:
            self._publish_plans[key] = publish_plan(self.map, policy, bucket_bytes=bucket_bytes, dtype=dtype)
        return self._publish_plans[key]

    def _key(self, policy: PolicyConfig, stage: int) -> tuple[int, ...]:
        ends = policy.first_stage_layers or 0, policy.last_stage_layers or 0
        pipeline = policy.pipeline_parallel, policy.virtual_pipeline_parallel, *ends
        return policy.tensor_parallel, *pipeline, policy.expert_parallel, policy.expert_tensor_size, stage

    def _shards(self, policy: PolicyConfig, stage: int) -> Iterator[ParameterShard]:
        """Yields the parameters of a stage's first expert-parallel rank: the others hold as much, in the same order."""
        stages = self.model.dimensions.pipeline_stages(policy)
        held = [
            entry
            for entry in self.map.entries_of_stage(stage, stages)
            # Buffers have neither gradients nor optimizer state, and a few KiB.
            if not entry.buffer and (entry.expert is None or self.map.expert_rank(entry, policy.expert_parallel) == 0)
        ]
        first, last = self.map.entries[0].megatron_name, self.map.entries[-1].megatron_name
        tied = self.model.dimensions.tie_word_embeddings and policy.pipeline_parallel > 1
        for entry in sorted(held, key=_registration):
            expert = entry.expert is not None
            ranks = policy.expert_tensor_size if expert else policy.tensor_parallel
            yield ParameterShard(
                entry.megatron_name,
                "layers" if entry.layer is not None else "embedding" if entry.megatron_name == first else "output",
                prod(self.map.shard_shape(entry, ranks)),
                expert=expert,
                shared_embedding=tied and entry.layer is None and entry.megatron_name in (first, last),
                chunk=self.map.chunk_of(entry, stages),
            )


def _registration(entry: Entry) -> tuple[int, int]:
    """Sort key of a stage's entries in the order in which megatron-core registers them; ties keep the map's order."""
    if entry.layer is None:
        return (-1 if entry.megatron_name.startswith("embedding") else 1 << 30, 0)
    own_name = entry.megatron_name.replace("_adapter.", ".")
    # Adapters of attention come behind all of it, but before the feed-forward part.
    place = next((i for i, name in enumerate(_REGISTERED_FIRST) if f".{name}." in own_name), 99)
    return entry.layer, place


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
    expert: bool = False
    """Whether it is of experts, summed over ranks of their own; `data_rank` below is a rank's place among those."""

    @property
    def padded_elements(self) -> int:
        """Length of the buffer, in elements."""
        return self.buckets[-1][1] if self.buckets else 0

    @property
    def elements(self) -> int:
        """Number of elements of the parameters alone, without padding."""
        return sum(end - begin for begin, end in self.ranges)

    def owned_elements(self, data_rank: int) -> int:
        """Number of elements whose optimizer state a data-parallel rank keeps: its part of each bucket less padding."""
        if not self.distributed:
            return self.elements
        if data_rank not in self._owned:
            self._owned[data_rank] = self._count_owned(data_rank)
        return self._owned[data_rank]

    @cached_property
    def _owned(self) -> dict[int, int]:
        """What `owned_elements` has counted, by rank: a search asks for the same a thousand times."""
        return {}

    def _count_owned(self, data_rank: int) -> int:
        owned = 0
        for (begin, end), bucket in zip(self.ranges, self.bucket_of, strict=True):
            bucket_begin, bucket_end = self.buckets[bucket]
            part = (bucket_end - bucket_begin) // self.data_ranks
            low = bucket_begin + data_rank * part
            owned += max(0, min(end, low + part) - max(begin, low))
        return owned


def gradient_buffer(
    shards: Sequence[ParameterShard],
    *,
    data_ranks: int,
    distributed: bool,
    bucket_elements: int | None,
    expert: bool = False,
) -> GradientBuffer:
    """The gradient buffer of some parameters, given in megatron-core's order.

    The rule is that of megatron-core 0.16 to 0.19 (distributed/param_and_grad_buffer): parameters lie in reverse order.
    Under the distributed optimizer each begins at a multiple of 64 elements, each bucket ends at a multiple of 128 and
    of the number of ranks, and a copy of a tied embedding has a bucket of its own.

    Args:
        shards: the parameters of one rank.
        data_ranks: ranks that hold the same parameters (data x context parallel).
        distributed: policy.distributed_optimizer.
        bucket_elements: size at which a bucket is closed; None: never.
        expert: the parameters are of experts alone.
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
    return GradientBuffer(tuple(ranges), tuple(bucket_of), tuple(buckets), data_ranks, distributed, expert)


def _padded(elements: int, multiple: int) -> int:
    return -(-elements // multiple) * multiple
