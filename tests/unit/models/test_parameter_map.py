"""The map names exactly what transformers' models hold, and loses nothing on the way to Megatron and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from megatron_entropic.models.dimensions import ModelDimensions, read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap, to_global_name, to_local_name
from megatron_entropic.models.stages import PipelineStages, StageSizes

Tiny = tuple[PreTrainedModel, Path]


def of(mapping: ParameterMap, stages: int) -> PipelineStages:
    """Equal stages of a map's model."""
    return StageSizes(stages).of_layers(mapping.dimensions.num_layers)


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    """What the checkpoint holds: a tied one has no lm_head.weight, experts are separate (fused in memory only)."""
    return load_file(directory / "model.safetensors")


def test_names_and_shapes_are_those_of_transformers(tiny: Tiny):
    directory = tiny[1]
    mapped = ParameterMap(read_dimensions(directory)).hf_tensors
    assert mapped == {name: tuple(tensor.shape) for name, tensor in state_of(directory).items()}


def test_every_tensor_belongs_to_exactly_one_exported_entry(tiny: Tiny):
    directory = tiny[1]
    mapping = ParameterMap(read_dimensions(directory))
    names = [name for entry in mapping.entries if entry.exported for name in entry.hf_names]
    assert sorted(names) == sorted(state_of(directory))
    megatron = [entry.megatron_name for entry in mapping.entries]
    assert len(set(megatron)) == len(megatron)
    numbers = sum(torch.Size(entry.shape).numel() for entry in mapping.entries if entry.exported)
    assert numbers == sum(tensor.numel() for tensor in state_of(directory).values())


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_whole_model_round_trip(tiny: Tiny, tp: int):
    directory = tiny[1]
    mapping, state = ParameterMap(read_dimensions(directory)), state_of(directory)
    back = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    for entry in mapping.entries:
        shards = [mapping.to_megatron_shard(entry, state, rank, tp) for rank in range(tp)]
        assert all(tuple(shard.shape) == mapping.shard_shape(entry, tp) for shard in shards)
        if entry.exported:
            for rank, shard in enumerate(shards):
                mapping.write_to_hf(entry, shard, back, rank, tp)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "tiny",
    # Latent attention is megatron-core's own module, which the parity tests compare.
    [(f, tied) for f in ("qwen3", "qwen2", "llama", "qwen3_moe", "mixtral") for tied in (False, True)],
    ids=str,
    indirect=True,
)
def test_megatron_s_use_of_the_tensors_computes_what_transformers_computes(tiny: Tiny):
    """Projections of one layer: k and v, or gate and up, have equal shapes, so only their use tells them apart."""
    model, directory = tiny
    dims = read_dimensions(directory)
    mapping, state = ParameterMap(dims), state_of(directory)
    hf_layer = model.model.layers[1]
    full = {
        entry.megatron_name.removeprefix("decoder.layers.1."): mapping.to_megatron_shard(entry, state, 0, 1)
        for entry in mapping.entries
        if entry.layer == 1
    }
    x = torch.randn(3, dims.hidden_size)
    linear = torch.nn.functional.linear
    qkv = linear(x, full["self_attention.linear_qkv.weight"], full.get("self_attention.linear_qkv.bias"))
    ratio = dims.num_attention_heads // dims.num_query_groups
    by_group = qkv.view(3, dims.num_query_groups, ratio + 2, dims.head_dim)
    q, k, v = by_group.split([ratio, 1, 1], dim=2)
    attention = hf_layer.self_attn
    torch.testing.assert_close(q.reshape(3, -1), attention.q_proj(x))
    torch.testing.assert_close(k.reshape(3, -1), attention.k_proj(x))
    torch.testing.assert_close(v.reshape(3, -1), attention.v_proj(x))
    torch.testing.assert_close(_feed_forward(x, full, dims), hf_layer.mlp(x.unsqueeze(0))[0])
    torch.testing.assert_close(
        linear(q.flatten(1), full["self_attention.linear_proj.weight"]), attention.o_proj(q.flatten(1))
    )
    same = {
        "input_layernorm": hf_layer.input_layernorm,
        "pre_mlp_layernorm": hf_layer.post_attention_layernorm,
    }
    if dims.qk_norm:
        same |= {"self_attention.q_layernorm": attention.q_norm, "self_attention.k_layernorm": attention.k_norm}
    assert all(torch.equal(full[f"{name}.weight"], norm.weight) for name, norm in same.items())


def _feed_forward(x: torch.Tensor, full: dict[str, torch.Tensor], dims: ModelDimensions) -> torch.Tensor:
    """[tokens, H] of layer 1; with experts as in megatron-core's router, softmax before or after the choice."""
    if not dims.has_experts(1):
        return _gated(x, full, "mlp")
    assert dims.experts is not None
    scores, chosen = (x @ full["mlp.router.weight"].T).topk(dims.experts.per_token)
    assert dims.experts.renormalised, "so that the softmax over the chosen is the same"
    weights = scores.softmax(-1)
    outputs = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            outputs[token] += weight * _gated(x[token], full, f"mlp.experts.local_experts.{expert}")
    return outputs


def _gated(x: torch.Tensor, full: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    gate, up = torch.nn.functional.linear(x, full[f"{prefix}.linear_fc1.weight"]).chunk(2, dim=-1)
    return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, full[f"{prefix}.linear_fc2.weight"])


def test_experts_are_numbered_over_the_model_and_owned_in_runs(tiny: Tiny):
    mapping = ParameterMap(read_dimensions(tiny[1]))
    experts = [entry for entry in mapping.entries if entry.expert is not None]
    if mapping.dimensions.experts is None:
        assert not experts
        return
    layers = {entry.layer for entry in experts}
    assert layers == ({0, 1} if mapping.dimensions.family == "mixtral" else {1})
    for rank in range(3):
        held = [e for e in experts if mapping.expert_rank(e, 3) == rank]
        first = mapping.first_expert(rank, 3)
        assert {entry.expert for entry in held} == {first, first + 1}
        for entry in held:
            assert entry.expert is not None
            local = to_local_name(entry.megatron_name, 0, first)
            assert f"local_experts.{entry.expert - first}." in local
            assert mapping.by_megatron_name(to_global_name(local, 0, first)) is entry
    with pytest.raises(ValueError, match="expert_parallel=4 does not divide the 6 experts"):
        mapping.first_expert(0, 4)
    with pytest.raises(ValueError, match="expert_tensor_parallel=8 does not divide the width of an expert"):
        mapping.shard_shape(experts[0], 8)


def test_buffers_are_those_of_the_routers(tiny: Tiny):
    mapping = ParameterMap(read_dimensions(tiny[1]))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert mapping.buffers == ({name} if mapping.dimensions.family == "deepseek_v3" else set())
    assert mapping.is_buffer("decoder.layers.1.mlp.router.expert_bias") == bool(mapping.buffers)
    assert not mapping.is_buffer("decoder.layers.1.mlp.router.weight")


def test_experts_of_a_grouped_layer_have_the_names_of_separate_ones():
    local = "decoder.layers.1.mlp.experts.linear_fc2.weight3"
    assert to_global_name(local, 4, 8) == "decoder.layers.5.mlp.experts.local_experts.11.linear_fc2.weight"


def test_tied_output_layer_comes_from_the_embedding_and_is_not_exported(tiny: Tiny):
    model, directory = tiny
    mapping = ParameterMap(read_dimensions(directory))
    output = mapping.by_megatron_name("output_layer.weight")
    tied = model.config.tie_word_embeddings
    assert output.exported is not tied
    assert output.hf_names == (("model.embed_tokens.weight",) if tied else ("lm_head.weight",))
    # A tied GPTModel has an output weight of its own only on a last stage that has no embedding.
    assert (output in mapping.entries_of_stage(0, of(mapping, 1))) is not tied
    assert output in mapping.entries_of_stage(1, of(mapping, 2))


def test_fused_norm_names_are_aliases(tiny: Tiny):
    mapping = ParameterMap(read_dimensions(tiny[1]))
    latent = mapping.dimensions.latent
    aliases = [("mlp.linear_fc1", "pre_mlp_layernorm"), ("self_attention.linear_qkv", "input_layernorm")]
    if latent is not None:
        aliases.append(("self_attention.linear_kv_up_proj", "self_attention.kv_layernorm"))
    if latent is not None and latent.query_rank is not None:
        aliases.append(("self_attention.linear_q_up_proj", "self_attention.q_layernorm"))
    for fused, plain in ((f"{layer}.layer_norm_weight", f"{norm}.weight") for layer, norm in aliases):
        entry = mapping.by_megatron_name(f"decoder.layers.1.{fused}")
        assert entry is mapping.by_megatron_name(f"decoder.layers.1.{plain}")
    with pytest.raises(KeyError, match=r"decoder\.layers\.2\."):
        mapping.by_megatron_name("decoder.layers.2.input_layernorm.weight")


def test_stages_share_out_the_parameters(tiny: Tiny):
    mapping = ParameterMap(read_dimensions(tiny[1]))
    stages = [mapping.entries_of_stage(stage, of(mapping, 2)) for stage in range(2)]
    assert stages[0] + stages[1] == mapping.entries
    assert stages[0][0].megatron_name == "embedding.word_embeddings.weight"
    assert [entry.megatron_name for entry in stages[1][-2:]] == [
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]
    assert {entry.layer for entry in stages[1][:-2]} == {1}
    assert [of(mapping, 2).of_chunk(stage).start for stage in range(2)] == [0, 1]


def test_layouts_that_the_model_does_not_allow_are_refused(tiny: Tiny):
    mapping = ParameterMap(read_dimensions(tiny[1]))
    groups = mapping.dimensions.num_query_groups
    with pytest.raises(ValueError, match=f"tensor_parallel=16 exceeds the model's {groups} key/value heads"):
        mapping.shard_shape(mapping.entries[0], 16)
    with pytest.raises(ValueError, match="tensor_parallel=16 exceeds"):
        mapping.to_megatron_shard(mapping.entries[0], {}, 0, 16)
    with pytest.raises(ValueError, match="pipeline_parallel=3 does not divide the 2 layers"):
        mapping.entries_of_stage(0, of(mapping, 3))


def test_stage_names_and_model_names():
    local = "decoder.layers.3.mlp.linear_fc1.weight"
    assert to_global_name(local, 18) == "decoder.layers.21.mlp.linear_fc1.weight"
    assert to_local_name(to_global_name(local, 18), 18) == local
    assert to_global_name("decoder.final_layernorm.weight", 18) == "decoder.final_layernorm.weight"
