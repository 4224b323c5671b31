"""Parameter counts by hand, and the rule of megatron-core's buffers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planned import known, tiny_config

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.planning.parameters import (
    ParameterShard,
    ParameterTable,
    find_model,
    gradient_buffer,
    read_model,
)

# Embedding 13 x 8; per layer two norms of 8, q 16 x 8, k and v 8 x 8, norms of 4, projection 8 x 16, 3 x 10 x 8.
TINY_LAYER = 2 * 8 + 16 * 8 + 2 * 8 * 8 + 2 * 4 + 8 * 16 + 3 * 10 * 8
TINY = 13 * 8 + 2 * TINY_LAYER + 8 + 13 * 8


def tiny_table(folder: Path, **changes: object) -> ParameterTable:
    path = folder / "config.json"
    path.write_text(json.dumps(tiny_config(**changes)))
    return ParameterTable(read_model(path, "tiny"))


@pytest.mark.parametrize(
    ("name", "elements", "active"),
    [
        ("Qwen3-8B", 8_190_735_360, 8_190_735_360 - 151_936 * 4096),
        ("Qwen3-32B", 32_762_123_264, 32_762_123_264 - 151_936 * 5120),
        ("Qwen3-30B-A3B", 30_532_122_624, 3_041_867_776),
        ("Qwen3-235B-A22B", 235_093_634_560, 21_568_433_664),
        # The first of 27 layers has no experts; 58 of 64 are idle for a token.
        ("Moonlight-16B-A3B", 15_960_108_544, 15_960_108_544 - 163_840 * 2048 - 26 * 58 * 3 * 2048 * 1408),
    ],
)
def test_whole_models(name: str, elements: int, active: int) -> None:
    table = known(name)
    assert table.elements == elements
    assert table.active_elements == active


def test_a_model_counted_by_hand(tmp_path: Path) -> None:
    assert tiny_table(tmp_path).elements == TINY
    assert tiny_table(tmp_path, tie_word_embeddings=True).elements == TINY - 13 * 8


def test_ranks_hold_the_model_and_its_padding() -> None:
    table = known("Qwen3-8B")
    policy = PolicyConfig(tensor_parallel=4, pipeline_parallel=4)
    stages = table.stages(policy)
    assert [stage.layers for stage in stages] == [9, 9, 9, 9]
    # Norms are on every tensor rank: 2 x 4096 + 2 x 128 in each layer, 4096 at the end. 4 divides the vocabulary.
    copies = 36 * (2 * 4096 + 2 * 128) + 4096
    assert 4 * sum(stage.elements for stage in stages) == table.elements + 3 * copies
    assert stages[0].elements_of("embedding") == stages[3].elements_of("output") - 4096 == 151_936 * 4096 // 4
    assert stages[1].elements == stages[1].elements_of("layers")


def test_the_vocabulary_is_padded(tmp_path: Path) -> None:
    stage = tiny_table(tmp_path).stage(PolicyConfig(tensor_parallel=2), 0)
    assert stage.elements_of("embedding") == 7 * 8
    assert stage.elements_of("output") == 7 * 8 + 8


def test_a_tied_embedding_is_on_both_ends(tmp_path: Path) -> None:
    table = tiny_table(tmp_path, tie_word_embeddings=True)
    whole = table.stage(PolicyConfig(), 0)
    assert whole.elements == table.elements
    first, last = table.stages(PolicyConfig(pipeline_parallel=2))
    assert first.elements + last.elements == table.elements + 13 * 8
    assert [shard.name for stage in (first, last) for shard in stage.shards if shard.shared_embedding] == [
        "embedding.word_embeddings.weight",
        "output_layer.weight",
    ]


def test_experts_are_spread_over_tensor_and_expert_ranks() -> None:
    table = known("Qwen3-30B-A3B")
    (one,) = table.stages(PolicyConfig())
    (spread,) = table.stages(PolicyConfig(tensor_parallel=2, data_parallel=8, expert_parallel=4))
    assert one.elements == table.elements
    assert one.expert_elements == 48 * 128 * 3 * 2048 * 768
    assert spread.expert_elements * 8 == one.expert_elements


def shards(*sizes: int, shared: int | None = None) -> list[ParameterShard]:
    return [ParameterShard(str(i), "layers", n, shared_embedding=i == shared) for i, n in enumerate(sizes)]


def test_a_buffer_without_the_distributed_optimizer_has_no_padding() -> None:
    buffer = gradient_buffer(shards(10, 70, 3), data_ranks=2, distributed=False, bucket_elements=None)
    assert buffer.ranges == ((0, 3), (3, 73), (73, 83))
    assert buffer.padded_elements == buffer.elements == buffer.owned_elements(1) == 83


def test_a_buffer_of_the_distributed_optimizer() -> None:
    buffer = gradient_buffer(shards(10, 70, 3), data_ranks=2, distributed=True, bucket_elements=None)
    # In reverse, each from a multiple of 64; the end to a multiple of 128.
    assert buffer.ranges == ((0, 3), (64, 134), (192, 202))
    assert buffer.padded_elements == 256
    assert [buffer.owned_elements(rank) for rank in range(2)] == [3 + 64, 6 + 10]


def test_three_ranks_pad_to_their_multiple() -> None:
    buffer = gradient_buffer(shards(10), data_ranks=3, distributed=True, bucket_elements=None)
    assert buffer.padded_elements == 3 * 128


def test_buckets_close_when_they_are_full_and_around_a_tied_embedding() -> None:
    full = gradient_buffer(shards(10, 70, 3), data_ranks=1, distributed=True, bucket_elements=100)
    assert full.buckets == ((0, 256), (256, 384))
    tied = gradient_buffer(shards(10, 70, 3, shared=0), data_ranks=1, distributed=True, bucket_elements=None)
    assert tied.buckets == ((0, 256), (256, 384))
    assert tied.ranges[-1] == (256, 266)


def test_models_are_found_by_directory_by_name_and_by_file(tmp_path: Path) -> None:
    assert find_model(Path("nowhere/Qwen3-8B-Base")).dimensions.num_layers == 36
    assert find_model(Path("nowhere/qwen3-30b-a3b-instruct")).experts is not None
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config()))
    assert find_model(tmp_path).dimensions.num_layers == 2
    assert find_model(Path("nowhere/Qwen3-8B"), config).dimensions.num_layers == 2
    with pytest.raises(ValueError, match=r"Qwen3-235B-A22B.*--model-config"):
        find_model(Path("nowhere/GPT-2"))


def test_an_unreadable_model_is_refused_with_its_own_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(tiny_config(hidden_act="gelu", vocab_size=0)))
    with pytest.raises(ValueError, match=r"mine\.json(.|\n)*vocab_size(.|\n)*gelu"):
        read_model(path, "mine")
    path.write_text(
        json.dumps(tiny_config(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_experts=4))
    )
    with pytest.raises(ValueError, match="num_experts_per_tok=8 is more than the 4 experts"):
        read_model(path, "mine")
