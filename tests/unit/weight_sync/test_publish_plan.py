"""Publish plans of real model sizes, from shapes alone."""

from __future__ import annotations

from math import prod

import pytest

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.models.dimensions import ModelDimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.models.read_config import ExpertDimensions, LatentAttention, SigmoidRouting
from megatron_entropic.models.stages import PipelineStages, StageSizes
from megatron_entropic.weight_sync.plan import PublishPlan, publish_plan

MIB = 2**20


def model(
    family: str,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    groups: int,
    head: int,
    vocab: int,
    tied: bool = False,
    experts: ExpertDimensions | None = None,
    latent: LatentAttention | None = None,
) -> ParameterMap:
    return ParameterMap(
        ModelDimensions(
            family=family,
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head,
            vocab_size=vocab,
            tie_word_embeddings=tied,
            qkv_bias=family == "qwen2",
            qk_norm=family.startswith("qwen3"),
            rope_theta=1e6,
            rope_scaling=None,
            rms_norm_eps=1e-6,
            max_position_embeddings=40960,
            experts=experts,
            latent=latent,
        )
    )


MODELS = {
    "Qwen3-8B": model("qwen3", 36, 4096, 12288, 32, 8, 128, 151936),
    "Qwen3-32B": model("qwen3", 64, 5120, 25600, 64, 8, 128, 151936),
    "Llama-3-8B": model("llama", 32, 4096, 14336, 32, 8, 128, 128256),
    "Qwen2.5-1.5B": model("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, tied=True),
    "Qwen3-30B-A3B": model(
        "qwen3_moe", 48, 2048, 6144, 32, 4, 128, 151936, experts=ExpertDimensions(128, 8, 768, renormalised=True)
    ),
    "Mixtral-8x7B": model(
        "mixtral", 32, 4096, 14336, 32, 8, 128, 32000, experts=ExpertDimensions(8, 2, 14336, renormalised=True)
    ),
    "DeepSeek-V3": model(
        "deepseek_v3",
        # Of 61, of which three have no experts.
        8,
        7168,
        18432,
        128,
        128,
        192,
        129280,
        experts=ExpertDimensions(
            256,
            8,
            2048,
            renormalised=True,
            dense_layers=(0, 1, 2),
            shared_ffn_hidden_size=2048,
            sigmoid=SigmoidRouting(8, 4, 2.5),
        ),
        latent=LatentAttention(1536, 512, rotary_head_dim=64, value_head_dim=128),
    ),
    "tiny": model("qwen2", 4, 24, 44, 12, 4, 2, 53, tied=True),
}
# Parameter counts as the model cards' checkpoints hold them.
PARAMETERS = {
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Llama-3-8B": 8_030_261_248,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Mixtral-8x7B": 46_702_792_704,
}


def stages_of(name: str, pp: int) -> PipelineStages:
    return StageSizes(pp).of_layers(MODELS[name].dimensions.num_layers)


def plan_of(name: str, pp: int = 1, tp: int = 2, bucket_bytes: int = 512 * MIB, **experts: int) -> PublishPlan:
    return publish_plan(
        MODELS[name],
        PolicyConfig(pipeline_parallel=pp, tensor_parallel=tp, **experts),
        bucket_bytes=bucket_bytes,
        dtype="bfloat16",
    )


@pytest.mark.parametrize("bucket_mib", [0.001, 64, 512, 4096])
@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_every_element_is_sent_exactly_once_within_the_limit(name: str, pp: int, tp: int, bucket_mib: float):
    limit = int(bucket_mib * MIB)
    plan = plan_of(name, pp, tp, limit)
    sent = [(n, s) for bucket in plan.buckets for n, s in zip(bucket.hf_names, bucket.hf_shapes, strict=True)]
    assert len({n for n, _ in sent}) == len(sent)
    assert dict(sent) == MODELS[name].hf_tensors
    assert sum(bucket.elements for bucket in plan.buckets) == sum(map(prod, MODELS[name].hf_tensors.values()))
    assert [bucket.index for bucket in plan.buckets] == list(range(len(plan.buckets)))
    for bucket in plan.buckets:
        assert bucket.items
        of_buffers = bool(set(bucket.hf_names) & MODELS[name].buffers)
        assert bucket.dtype == ("float32" if of_buffers else "bfloat16")
        assert of_buffers == (set(bucket.hf_names) <= MODELS[name].buffers)
        assert bucket.bytes == (4 if of_buffers else 2) * sum(map(prod, bucket.hf_shapes))
        assert bucket.bytes <= limit or len(bucket.items) == 1
        stages = {MODELS[name].stage_of(item.entry, stages_of(name, pp)) for item in bucket.items}
        assert stages == {bucket.owner_stage}
    stages_in_order = [bucket.owner_stage for bucket in plan.buckets]
    assert stages_in_order == sorted(stages_in_order)
    assert set(stages_in_order) == set(range(pp))


def test_experts_are_gathered_in_equal_parts_of_all_their_ranks():
    plan = plan_of("Qwen3-30B-A3B", pp=2, tp=2, expert_parallel=8, expert_tensor_parallel=1)
    sent = [(n, s) for bucket in plan.buckets for n, s in zip(bucket.hf_names, bucket.hf_shapes, strict=True)]
    assert dict(sent) == MODELS["Qwen3-30B-A3B"].hf_tensors
    assert len(sent) == len(MODELS["Qwen3-30B-A3B"].hf_tensors)
    assert {plan.gather_ranks(bucket) for bucket in plan.buckets if bucket.of_experts} == {8}
    assert {plan.gather_ranks(bucket) for bucket in plan.buckets if not bucket.of_experts} == {2}
    for bucket in plan.buckets:
        assert {item.entry.expert is not None for item in bucket.items} == {bucket.of_experts}
        if not bucket.of_experts:
            assert bucket.held_by(3) == bucket.items
            continue
        parts = [bucket.held_by(rank) for rank in range(8)]
        assert sum(len(part) for part in parts) == len(bucket.items)
        for rank, part in enumerate(parts):
            assert [item.shard_shape for item in part] == [item.shard_shape for item in parts[0]]
            assert {item.entry.expert // 16 for item in part} == {rank}
        assert bucket.shard_elements * 8 == bucket.elements
    assert "expert_parallel=8, expert_tensor_parallel=1" in plan.describe()
    with pytest.raises(ValueError, match="expert_parallel=3 does not divide the 128 experts"):
        plan_of("Qwen3-30B-A3B", expert_parallel=3)


@pytest.mark.parametrize("name", PARAMETERS)
def test_element_counts_are_those_of_the_published_models(name: str):
    assert plan_of(name).bytes == 2 * PARAMETERS[name]


def test_buckets_are_filled_not_cut_at_every_tensor():
    """Flat buckets instead of one collective per tensor: at most two half-empty neighbours."""
    plan = plan_of("Qwen3-8B", pp=1, tp=2, bucket_bytes=512 * MIB)
    assert len(plan.buckets) < 2 * plan.bytes / (512 * MIB) + 1
    for bucket, following in zip(plan.buckets, plan.buckets[1:], strict=False):
        assert bucket.bytes + 2 * following.items[0].hf_elements > plan.bucket_bytes


def test_plan_is_a_function_of_its_arguments():
    assert plan_of("Qwen3-32B", pp=4, tp=4) == plan_of("Qwen3-32B", pp=4, tp=4)
    assert plan_of("Qwen3-32B", pp=4, tp=4) != plan_of("Qwen3-32B", pp=4, tp=8)


def test_shard_sizes_count_padding_and_replication():
    """Vocabulary 53 over 2 ranks: 27 rows each; a norm is contributed whole by each."""
    plan = plan_of("tiny", tp=2)
    shards = {item.entry.megatron_name: item.shard_shape for bucket in plan.buckets for item in bucket.items}
    assert shards["embedding.word_embeddings.weight"] == (27, 24)
    assert shards["decoder.final_layernorm.weight"] == (24,)
    assert shards["decoder.layers.0.self_attention.linear_qkv.weight"] == (20, 24)
    assert shards["decoder.layers.0.mlp.linear_fc2.weight"] == (24, 22)
    assert "output_layer.weight" not in shards, "engines tie the output layer themselves"
    assert sum(bucket.shard_elements for bucket in plan.buckets) == sum(map(prod, shards.values()))


def test_description_shows_bytes_and_collectives():
    lines = plan_of("Qwen3-8B", pp=2, tp=4).describe().splitlines()
    plan = plan_of("Qwen3-8B", pp=2, tp=4)
    assert len(lines) == len(plan.buckets) + 2
    # The embedding: 151936 x 4096 in bfloat16 is 1187 MiB, a quarter of it from each rank.
    assert lines[1].split() == ["0", "0", "bfloat16", "1", "1", "1187.0", "296.8", "gather/4", "+", "broadcast"]
    assert lines[-2].split()[-6:] == ["gather/4", "+", "send", "1->0", "+", "broadcast"]
    assert "15622.6 MiB to each engine" in lines[-1]


def test_impossible_layouts_are_refused_with_every_reason():
    with pytest.raises(ValueError, match="exceeds the model's 8 key/value heads") as error:
        plan_of("Qwen3-8B", pp=5, tp=16)
    assert "pipeline_parallel=5 does not divide the 36 layers" in str(error.value)
    with pytest.raises(ValueError, match="bucket_bytes must be positive"):
        plan_of("tiny", bucket_bytes=0)
