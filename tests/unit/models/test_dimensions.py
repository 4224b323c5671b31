"""config.json of any age is understood, and what cannot be trained is refused with every reason at once."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedModel

from megatron_entropic.config.policy import PolicyConfig
from megatron_entropic.models.dimensions import ModelDimensions, read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.models.read_config import ExpertDimensions, LatentAttention, SigmoidRouting
from megatron_entropic.models.stages import StageSizes

# As published with Qwen3-8B by transformers 4 (shortened to what describes the model).
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def read(directory: Path, config: dict[str, Any]) -> ModelDimensions:
    (directory / "config.json").write_text(json.dumps(config))
    return read_dimensions(directory)


def test_published_qwen3_8b(tmp_path: Path):
    assert read(tmp_path, QWEN3_8B) == ModelDimensions(
        family="qwen3",
        num_layers=36,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
        rope_theta=1e6,
        rope_scaling=None,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
    )


# As published with Qwen3-30B-A3B (shortened likewise).
QWEN3_30B_A3B = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
# As published with Mixtral-8x7B-v0.1.
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


# As published with DeepSeek-V3 but for its FP8 quantisation, and with Moonlight-16B-A3B (both shortened likewise).
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
MOONLIGHT = DEEPSEEK_V3 | {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}


def test_published_models_with_latent_attention(tmp_path: Path):
    deepseek = read(tmp_path, DEEPSEEK_V3)
    assert deepseek.latent == LatentAttention(1536, 512, rotary_head_dim=64, value_head_dim=128)
    assert (deepseek.head_dim, deepseek.size("attended"), deepseek.prediction_layers) == (192, 128 * 128, 1)
    assert deepseek.rope_scaling is not None
    assert (deepseek.rope_scaling["rope_type"], deepseek.rope_scaling["beta_fast"]) == ("yarn", 32)
    assert deepseek.experts == ExpertDimensions(
        256,
        8,
        2048,
        renormalised=True,
        dense_layers=(0, 1, 2),
        shared_ffn_hidden_size=2048,
        sigmoid=SigmoidRouting(groups=8, chosen_groups=4, scaling=2.5),
    )
    assert deepseek.cached_elements(engine_ranks=8) == 61 * 576
    moonlight = read(tmp_path, MOONLIGHT)
    assert moonlight.latent == LatentAttention(None, 512, rotary_head_dim=64, value_head_dim=128)
    assert moonlight.rope_scaling is None
    assert moonlight.experts is not None
    assert moonlight.experts.shared_ffn_hidden_size == 2816


def test_parameters_of_published_models_with_latent_attention(tmp_path: Path):
    # 671B and 15.96B without the layer that predicts a second token; biases of routers are no parameters.
    for config, parameters in ((DEEPSEEK_V3, 671_026_404_352), (MOONLIGHT, 15_960_108_544)):
        found = ParameterMap(read(tmp_path, config))
        assert sum(prod(s) for name, s in found.hf_tensors.items() if name not in found.buffers) == parameters


def test_published_mixtures_of_experts(tmp_path: Path):
    qwen = read(tmp_path, QWEN3_30B_A3B)
    assert qwen.experts == ExpertDimensions(count=128, per_token=8, ffn_hidden_size=768, renormalised=True)
    assert (qwen.qk_norm, qwen.has_dense_layers, qwen.has_experts(47)) == (True, False, True)
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in QWEN3_30B_A3B.items()}
    assert read(tmp_path, renamed) == qwen, "transformers 5 writes num_local_experts"
    mixtral = read(tmp_path, MIXTRAL_8X7B)
    assert mixtral.experts == ExpertDimensions(count=8, per_token=2, ffn_hidden_size=14336, renormalised=True)
    assert mixtral.head_dim == 128


def test_layers_without_experts(tmp_path: Path):
    every_third = read(tmp_path, QWEN3_30B_A3B | {"num_hidden_layers": 7, "decoder_sparse_step": 3})
    assert [every_third.has_experts(layer) for layer in range(7)] == [False, False, True, False, False, True, False]
    named = read(tmp_path, QWEN3_30B_A3B | {"mlp_only_layers": [0, 5], "norm_topk_prob": False})
    assert named.experts == ExpertDimensions(128, 8, 768, renormalised=False, dense_layers=(0, 5))
    # The dense width matters only where there are dense layers.
    narrow = QWEN3_30B_A3B | {"intermediate_size": 6145}
    assert read(tmp_path, narrow).parallel_problems(2) == []
    (problem,) = read(tmp_path, narrow | {"mlp_only_layers": [3]}).parallel_problems(2)
    assert problem == "tensor_parallel=2 does not divide the feed-forward width (6145)"


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (
            QWEN3_30B_A3B,
            {"num_experts": 0, "moe_intermediate_size": None},
            ["num_experts must", "moe_intermediate_siz"],
        ),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, ["num_experts_per_tok=129 is more than the 128 experts"]),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 1}, ["the router would get no gradient"]),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0, "mlp_only_layers": 3}, ["decoder_sparse_step", "mlp_only_layers"]),
        (MIXTRAL_8X7B, {"sliding_window": 4096, "router_jitter_noise": 0.1}, ["sliding_window=4096", "jitter"]),
        (
            DEEPSEEK_V3,
            {"topk_method": None, "scoring_func": "softmax", "n_group": None, "first_k_dense_replace": -1},
            ["topk_method=None: only", "scoring_func='softmax': only", "n_group must", "first_k_dense_replace must"],
        ),
        (DEEPSEEK_V3, {"topk_group": 2}, ["chooses groups by their 4 best experts, the model by their 2 best"]),
        (DEEPSEEK_V3, {"n_group": 7}, ["topk_group=4 of n_group=7 groups of 256 experts"]),
        (
            DEEPSEEK_V3,
            {"kv_lora_rank": 0, "q_lora_rank": -1, "rope_interleave": False, "num_key_value_heads": 8},
            ["kv_lora_rank must be", "q_lora_rank must be", "rope_interleave=False", "num_key_value_heads=8 differs"],
        ),
        (DEEPSEEK_V3, {"rope_scaling": {"type": "linear", "factor": 2}}, ["supported: default, yarn"]),
        (
            DEEPSEEK_V3,
            {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 0, "attention_factor": 1.5, "truncate": False}},
            ["mscale=0", "attention_factor", "truncate", "lacks original_max_position_embeddings, mscale_all_dim"],
        ),
    ],
    ids=str,
)
def test_unsupported_experts_are_refused(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], words: list[str]
):
    with pytest.raises(ValueError, match="this model cannot be used") as error:
        read(tmp_path, base | change)
    for word in words:
        assert word in str(error.value)


def test_spreading_experts_is_refused_with_every_reason(tmp_path: Path):
    qwen, dense = read(tmp_path, QWEN3_30B_A3B), read(tmp_path, QWEN3_8B)
    assert qwen.parallel_problems(4, StageSizes(3), expert_parallel=32, expert_tensor_parallel=1) == []
    assert qwen.parallel_problems(4, expert_parallel=5, expert_tensor_parallel=9) == [
        "expert_parallel=5 does not divide the 128 experts",
        "expert_tensor_parallel=9 does not divide the width of an expert (768)",
    ]
    policy = PolicyConfig(tensor_parallel=2, data_parallel=4, expert_parallel=8)
    assert [problem.split(":")[0].split(" does")[0] for problem in qwen.layout_problems(policy)] == [
        "expert_parallel=8 x expert tensor parallel 2",
        "sequence_parallel=false",
    ]
    fitting = policy.model_copy(update={"expert_tensor_parallel": 1, "sequence_parallel": True})
    assert qwen.layout_problems(fitting) == []
    (uneven,) = qwen.layout_problems(fitting.model_copy(update={"expert_parallel": 1}))
    assert uneven.startswith("expert_tensor_parallel=1 differs from tensor_parallel=2")
    assert dense.parallel_problems(1, expert_parallel=2) == ["expert_parallel=2: the model has no experts"]


def test_old_and_new_spelling_of_rope_agree(tmp_path: Path):
    new = {k: v for k, v in QWEN3_8B.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000}
    assert read(tmp_path, new) == read(tmp_path, QWEN3_8B)
    llama = {**QWEN3_8B, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    llama |= {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
    old = read(tmp_path, llama)
    del llama["rope_theta"], llama["rope_scaling"]
    assert read(tmp_path, llama | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}}) == old
    assert old.rope_theta == 500000.0
    assert old.rope_scaling == LLAMA3_ROPE


def test_what_transformers_writes_is_what_is_read(tiny: tuple[PreTrainedModel, Path]):
    model, directory = tiny
    dims = read_dimensions(directory)
    config = model.config
    assert dims.family == config.model_type
    attention = model.model.layers[0].self_attn
    queries = attention.q_b_proj if getattr(attention, "q_lora_rank", None) else attention.q_proj
    assert dims.head_dim * dims.num_attention_heads == queries.out_features
    assert dims.tie_word_embeddings == config.tie_word_embeddings
    assert dims.qkv_bias == (queries.bias is not None)
    assert dims.qk_norm == hasattr(attention, "q_norm")
    assert dims.rope_theta == config.rope_parameters["rope_theta"]


def test_llama3_rope_saved_by_transformers(tmp_path: Path):
    config = LlamaConfig(num_hidden_layers=2, rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    dims = read_dimensions(tmp_path)
    assert dims.rope_scaling == LLAMA3_ROPE
    assert dims.num_query_groups == 32, "Llama without num_key_value_heads has one per attention head"


def test_absent_keys_get_the_family_s_defaults(tmp_path: Path):
    config = {k: v for k, v in QWEN3_8B.items() if k not in ("head_dim", "rope_theta", "tie_word_embeddings")}
    config["hidden_size"] = 2560
    assert read(tmp_path, config).head_dim == 128
    assert read(tmp_path, config).rope_theta == 10000.0
    assert read(tmp_path, config | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}).head_dim == 80


def test_switched_off_sliding_window_is_accepted(tmp_path: Path):
    assert read(tmp_path, QWEN3_8B | {"sliding_window": 32768}).num_layers == 36
    window_after_last_layer = {"use_sliding_window": True, "sliding_window": 32768, "max_window_layers": 36}
    assert read(tmp_path, QWEN3_8B | window_after_last_layer).num_layers == 36


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            ["MistralForCausalLM", "Qwen3ForCausalLM, Qwen2ForCausalLM, Llama"],
        ),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, ["Qwen2ForSequenceClassification is not supported"]),
        ({"architectures": None, "model_type": "gpt2"}, ["model_type 'gpt2' is not supported"]),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 35}, ["sliding-window"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding-window"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope type 'yarn' is not supported"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0, "factor": 2.0}}, ["rope type 'linear'"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["lacks low_freq_factor, high_freq_factor, orig"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised (fp8)"]),
        ({"attention_bias": True}, ["attention_bias=true"]),
        ({"mlp_bias": True}, ["mlp_bias=true"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"num_hidden_layers": None, "vocab_size": "many"}, ["num_hidden_layers must be", "vocab_size must be"]),
        ({"num_key_value_heads": 5}, ["32 heads cannot share 5"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_models_are_refused_by_name(tmp_path: Path, change: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError, match="this model cannot be used") as error:
        read(tmp_path, QWEN3_8B | change)
    for word in words:
        assert word in str(error.value)


def test_one_error_lists_every_problem(tmp_path: Path):
    change = {
        "quantization_config": {"quant_method": "awq"},
        "rope_scaling": {"type": "dynamic"},
        "attention_bias": True,
        "hidden_size": 0,
    }
    with pytest.raises(ValueError, match="cannot be used") as error:
        read(tmp_path, QWEN3_8B | change)
    for word in ("awq", "dynamic", "attention_bias", "hidden_size must be a positive integer, found 0"):
        assert word in str(error.value)


def test_missing_and_broken_files_are_said_plainly(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere: no such model directory"):
        read_dimensions(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_dimensions(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(ValueError, match="not readable as JSON"):
        read_dimensions(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        read_dimensions(tmp_path)
