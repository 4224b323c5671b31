"""Parameters and publications of a layout counted by layer instead of by tensor, to search thousands of layouts.

Layers of one kind have equal parameters, so that a layer counts as one parameter, or as two where it has experts. The
padding between parameters and the ends of buckets are lost: sums differ by parts in a million from `ParameterTable`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.planning.parameters import ParameterShard, ParameterTable
from megatron_entropic.planning.plan import BUCKET_BYTES, Publication
from megatron_entropic.planning.step import PlannedStep


class SketchedTable(ParameterTable):
    """Parameters of every rank of one model under any layout, layer by layer."""

    def __init__(self, table: ParameterTable) -> None:
        beside = {name: SketchedTable(frozen) for name, frozen in table.beside.items()}
        super().__init__(table.model, table.map, beside=beside)
        self._layers: dict[tuple[bool, int, int, int], tuple[int, int]] = {}

    def layer_elements(self, sparse: bool, policy: PolicyConfig) -> tuple[int, int]:
        """Numbers of elements of a layer on each rank: dense ones, and those of the rank's experts."""
        key = sparse, policy.tensor_parallel, policy.expert_tensor_size, policy.expert_parallel
        if key not in self._layers:
            dimensions = self.model.dimensions
            layer = next(n for n in range(dimensions.num_layers) if dimensions.has_experts(n) == sparse)
            dense = experts = 0
            for entry in self.map.entries:
                if entry.layer != layer or entry.buffer:
                    continue
                if entry.expert is None:
                    dense += prod(self.map.shard_shape(entry, policy.tensor_parallel))
                elif entry.expert == 0:
                    experts += prod(self.map.shard_shape(entry, policy.expert_tensor_size))
            count = dimensions.experts.count // policy.expert_parallel if dimensions.experts else 0
            self._layers[key] = dense, experts * count
        return self._layers[key]

    def _shards(self, policy: PolicyConfig, stage: int) -> Iterator[ParameterShard]:
        dimensions, chunks, stages = self.model.dimensions, policy.virtual_pipeline_parallel, policy.pipeline_parallel
        placed = dimensions.pipeline_stages(policy)
        vocabulary = dimensions.padded_vocab_size(policy.tensor_parallel) // policy.tensor_parallel
        embedding = vocabulary * dimensions.hidden_size
        tied = dimensions.tie_word_embeddings
        if stage == 0:
            yield ParameterShard("embedding", "embedding", embedding, shared_embedding=tied and stages > 1)
        for chunk in range(chunks):
            for layer in placed.of_chunk(stage, chunk):
                dense, experts = self.layer_elements(dimensions.has_experts(layer), policy)
                yield ParameterShard(f"{layer}", "layers", dense, chunk=chunk)
                if experts:
                    yield ParameterShard(f"{layer}.experts", "layers", experts, expert=True, chunk=chunk)
        if stage == stages - 1:
            output = 0 if tied and stages == 1 else embedding
            yield ParameterShard("output", "output", output + dimensions.hidden_size, chunk=chunks - 1)


def sketched_publication(step: PlannedStep) -> Publication:
    """The publication of a step's weights, without its buckets one by one."""
    policy, table, item = step.policy, step.table, step.item_bytes
    engine_bytes = table.elements * item
    gathered, forwarded = 0, 0
    for stage in step.end_stages:
        parameters = table.stage(policy, stage)
        dense = (parameters.elements - parameters.expert_elements) * (policy.tensor_parallel - 1)
        experts = parameters.expert_elements * (policy.expert_tensor_size * policy.expert_parallel - 1)
        gathered = max(gathered, (dense + experts) * item)
    if policy.pipeline_parallel > 1:
        forwarded = round(engine_bytes * (1 - 1 / policy.pipeline_parallel))
    buckets = -(-engine_bytes // BUCKET_BYTES)
    return Publication(engine_bytes, len(table.map.hf_tensors), buckets, 3 * buckets, gathered, forwarded)
