"""Publish plans of the models whose sizes are shipped, under layouts that fit them, counted in another way."""

from __future__ import annotations

from collections import Counter
from math import prod

import pytest

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.models.stages import StageSizes
from megatron_entropic.planning.parameters import KNOWN_MODELS, read_model
from megatron_entropic.weight_sync.plan import Bucket, publish_plan

MIB = 2**20
# (tensor, pipeline, expert) parallel sizes
LAYOUTS = {
    "Qwen3-8B": [(1, 1, 1), (2, 1, 1), (4, 2, 1), (8, 4, 1)],
    "Qwen3-32B": [(2, 2, 1), (4, 4, 1), (8, 8, 1)],
    "Qwen3-30B-A3B": [(1, 1, 8), (2, 2, 4), (4, 1, 16)],
    "Qwen3-235B-A22B": [(1, 2, 16), (4, 2, 32)],
}
CASES = [(name, *layout) for name, layouts in LAYOUTS.items() for layout in layouts]


@pytest.fixture(scope="module")
def maps() -> dict[str, ParameterMap]:
    return {name: ParameterMap(read_model(KNOWN_MODELS / f"{name}.json", name).dimensions) for name in LAYOUTS}


@pytest.mark.parametrize(("name", "tensor", "stages", "experts"), CASES)
def test_every_element_once_bytes_of_each_rank_and_collectives_of_each_bucket(
    maps: dict[str, ParameterMap], name: str, tensor: int, stages: int, experts: int
):
    found = maps[name]
    plan = publish_plan(
        found,
        PolicyConfig(
            tensor_parallel=tensor, pipeline_parallel=stages, expert_parallel=experts, expert_tensor_parallel=1
        ),
        bucket_bytes=512 * MIB,
        dtype="bfloat16",
    )
    sent = Counter(pair for b in plan.buckets for pair in zip(b.hf_names, b.hf_shapes, strict=True))
    assert set(sent.values()) == {1}
    assert dict(sent.keys()) == found.hf_tensors
    assert plan.bytes == 2 * sum(prod(shape) for shape in found.hf_tensors.values())
    placed = StageSizes(stages).of_layers(found.dimensions.num_layers)
    for stage in range(stages):
        entries = [entry for entry in found.entries_of_stage(stage, placed) if entry.exported]
        buckets = [bucket for bucket in plan.buckets if bucket.owner_stage == stage]
        dense = sum(prod(found.shard_shape(entry, tensor)) for entry in entries if entry.expert is None)
        assert sum(bucket.shard_bytes for bucket in buckets if not bucket.of_experts) == 2 * dense
        # Each expert-parallel rank contributes its own experts and nothing else.
        of_experts = sum(prod(found.shard_shape(entry, 1)) for entry in entries if entry.expert is not None)
        assert sum(bucket.shard_bytes for bucket in buckets if bucket.of_experts) == 2 * of_experts // experts
    for bucket in plan.buckets:
        assert plan.collectives(bucket) == expected_collectives(bucket, tensor, experts)
    # The number of collectives goes with bytes, not with tensors.
    assert len(plan.buckets) <= 2 * plan.bytes / (512 * MIB) + 3 * stages
    assert f"{len(plan.buckets)} buckets" in plan.describe()


def expected_collectives(bucket: Bucket, tensor: int, experts: int) -> tuple[str, ...]:
    ranks = experts if bucket.of_experts else tensor
    gather = (f"gather/{ranks}",) if ranks > 1 else ()
    send = (f"send {bucket.owner_stage}->0",) if bucket.owner_stage else ()
    return (*gather, *send, "broadcast")


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-32B"])
def test_twice_the_bucket_size_means_about_half_the_collectives(maps: dict[str, ParameterMap], name: str):
    counts = [
        len(
            publish_plan(maps[name], PolicyConfig(tensor_parallel=4), bucket_bytes=size * MIB, dtype="bfloat16").buckets
        )
        for size in (512, 1024, 2048)
    ]
    tensors = len(maps[name].hf_tensors)
    assert counts[0] < tensors / 5
    assert counts[1] <= 0.7 * counts[0]
    assert counts[2] <= 0.7 * counts[1]
