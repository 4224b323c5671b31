"""config.json: what is left out is what transformers takes, and what is no value of its key is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_entropic.errors import UserError
from megatron_entropic.models.config_values import REQUIRED_SIZES
from megatron_entropic.models.dimensions import ModelDimensions, read_dimensions
from megatron_entropic.models.families import ARCHITECTURES

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
CLASSES = {
    "qwen3": ("Qwen3Config", {"num_attention_heads": 32}),
    "qwen2": ("Qwen2Config", {"num_attention_heads": 32}),
    "llama": ("LlamaConfig", {"num_attention_heads": 32}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_attention_heads": 32}),
    "mixtral": ("MixtralConfig", {"num_attention_heads": 32}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {"num_attention_heads": 128, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    ),
}
KEYS = (
    *(
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
    ),
    *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "num_experts", "num_local_experts"),
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"),
    *("mlp_only_layers", "router_jitter_noise", "n_group", "topk_group", "n_shared_experts", "routed_scaling_factor"),
    *("first_k_dense_replace", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("rope_interleave", "num_nextn_predict_layers", "rope_theta"),
)
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")


def written(family: str) -> dict[str, Any]:
    """All keys of a small model, as transformers writes them."""
    name, more = CLASSES[family]
    made = getattr(transformers, name)(**SIZES, **more)
    config = json.loads(made.to_json_string(use_diff=False)) | more
    return config | {"architectures": [ARCHITECTURES[family].hf_class]}


def read(folder: Path, config: dict[str, Any]) -> ModelDimensions:
    (folder / "config.json").write_text(json.dumps(config))
    return read_dimensions(folder)


def refusal(folder: Path, config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        read(folder, config)
    return str(error.value)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_key_that_is_left_out_is_what_transformers_takes_for_it(tmp_path: Path, family: str):
    full, wrong = written(family), []
    for key in KEYS:
        left_out = ROPE_KEYS if key == "rope_theta" else (key,)
        config = {name: value for name, value in full.items() if name not in left_out}
        found = read(tmp_path, config)
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        taken = theirs.rope_parameters["rope_theta"] if key == "rope_theta" else getattr(theirs, key, None)
        if taken is not None and read(tmp_path, config | {key: taken}) != found:
            wrong.append(f"without {key} we take another value than {taken}")
    assert not wrong


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_defaults_are_those_of_transformers_classes(family: str):
    made = getattr(transformers, CLASSES[family][0])()
    theirs = {key: getattr(made, key, None) for key in ARCHITECTURES[family].defaults} | {
        "rope_theta": made.rope_parameters["rope_theta"]
    }
    assert dict(ARCHITECTURES[family].defaults) == theirs


@pytest.mark.parametrize("key", REQUIRED_SIZES)
def test_sizes_are_not_guessed(tmp_path: Path, key: str):
    config = written("llama")
    del config[key]
    assert f"{key} must be a positive integer, found None" in refusal(tmp_path, config)


@pytest.mark.parametrize(
    ("family", "key", "value", "words"),
    [
        ("llama", "rope_theta", "x", "rope_theta must be a positive number, found 'x'"),
        ("llama", "rope_theta", -1, "rope_theta must be a positive number, found -1"),
        ("llama", "rope_theta", float("nan"), "rope_theta must be a finite number, found nan"),
        ("llama", "rope_theta", float("inf"), "rope_theta must be a finite number, found inf"),
        ("llama", "rope_theta", 10**400, "rope_theta must be a finite number"),
        ("llama", "rope_theta", True, "rope_theta must be a positive number, found True"),
        ("llama", "rms_norm_eps", None, "rms_norm_eps must be a positive number, found None"),
        ("llama", "rms_norm_eps", 0, "rms_norm_eps must be a positive number, found 0"),
        ("llama", "tie_word_embeddings", "yes", "tie_word_embeddings must be true or false, found 'yes'"),
        ("llama", "hidden_size", 1.5, "hidden_size must be a positive integer, found 1.5"),
        ("llama", "hidden_size", "big", "hidden_size must be a positive integer, found 'big'"),
        ("llama", "num_attention_heads", -4, "num_attention_heads must be a positive integer, found -4"),
        ("llama", "vocab_size", 10**9, "vocab_size must be a positive integer of at most 16,777,216, found 1000000000"),
        ("llama", "num_hidden_layers", 10**9, "num_hidden_layers must be a positive integer of at most 1,000"),
        ("llama", "head_dim", 2**60, "head_dim must be a positive integer of at most 16,777,216"),
        ("llama", "max_position_embeddings", 10**30, "max_position_embeddings must be a positive integer of at most"),
        ("llama", "num_key_value_heads", "8", "num_key_value_heads must be a positive integer, found '8'"),
        ("llama", "architectures", 5, "architectures must be a list of names, found 5"),
        ("llama", "architectures", [1], "architectures must be a list of names, found [1]"),
        ("llama", "model_type", "gpt2", "model_type must be 'llama', that of LlamaForCausalLM, found 'gpt2'"),
        ("llama", "model_type", None, "model_type must be 'llama', that of LlamaForCausalLM, found None"),
        (
            "llama",
            "torch_dtype",
            "float8",
            "torch_dtype must be one of float32, bfloat16, float16, float64",
        ),
        ("llama", "hidden_act", ["silu"], "hidden_act must be a text, found ['silu']"),
        ("llama", "rope_scaling", "linear", "rope_scaling must be an object or null, found 'linear'"),
        ("llama", "rope_scaling", {"rope_type": "llama3", "factor": "x"}, "factor of the rope parameters must be"),
        (
            "llama",
            "rope_scaling",
            {"rope_type": "llama3", "type": "linear"},
            "rope_type='llama3' and type='linear' differ",
        ),
        ("llama", "quantization_config", {"quant_method": "fp8", "weight_block_size": 3}, "quantised (fp8)"),
        ("qwen2", "layer_types", 3, "layer_types must be a list of texts, found 3"),
        ("qwen2", "max_window_layers", "x", "max_window_layers must be an integer of at least 0, found 'x'"),
        ("qwen3_moe", "mlp_only_layers", [[0]], "mlp_only_layers must be a list of layers, found [[0]]"),
        ("qwen3_moe", "num_experts", 10**6, "are more than any model has"),
        ("qwen3_moe", "num_experts", 7, "num_experts=7 and num_local_experts=128: they must be the same"),
        ("mixtral", "num_experts", 4, "num_local_experts=8 and num_experts=4: they must be the same"),
        ("deepseek_v3", "routed_scaling_factor", "x", "routed_scaling_factor must be a positive number, found 'x'"),
        ("deepseek_v3", "kv_lora_rank", 10**12, "kv_lora_rank must be a positive integer, found 1000000000000"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_value_of_its_key_is_refused_by_name(tmp_path: Path, family: str, key: str, value: Any, words: str):
    config = {name: given for name, given in written(family).items() if name not in ROPE_KEYS}
    message = refusal(tmp_path, config | {key: value})
    assert words in message
    assert "config.json" in message


def test_all_wrong_values_are_in_one_message(tmp_path: Path):
    config = written("qwen3_moe") | {"rms_norm_eps": "x", "vocab_size": -1, "hidden_act": "relu", "num_experts": 0}
    message = refusal(tmp_path, config)
    for key in ("rms_norm_eps", "vocab_size", "hidden_act", "num_experts"):
        assert f"- {key}" in message


@pytest.mark.parametrize("text", ["[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}", '{"a": ', "[]", "\ufeff{}"])
def test_a_file_that_is_no_json_object_is_said_to_be_none(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json: (not readable as JSON|expected a JSON object)"):
        read_dimensions(tmp_path)


def test_experts_with_a_window_in_all_layers_are_refused(tmp_path: Path):
    """Qwen3-MoE has no `max_window_layers`: its switch is for all layers."""
    config = written("qwen3_moe") | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 48}
    assert "sliding-window attention is in use" in refusal(tmp_path, config)
