"""Experts in a vLLM engine: what is published arrives in its fused, packed weights, and it samples from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rollout_engine import VOCABULARY, distances, load, without_weights

SCRIPT = Path(__file__).parent / "scripts" / "expert_engine_run.py"
# vLLM's CPU kernel wants a hidden size that 32 divides; the width of an expert is padded.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "initializer_range": 0.15,
    "eos_token_id": 3,
}
# The latent sizes are the only ones that vLLM's CPU kernel knows. Layer 0 is dense.
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 120,
    "moe_intermediate_size": 40,
    "num_experts_per_tok": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def write_model(family: str, directory: Path, seed: int) -> None:
    """A random model with experts, whose width is no multiple of 32."""
    from transformers import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.manual_seed(seed)
    if family == "deepseek_v3":
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **LATENT}))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    elif family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=88, num_local_experts=4))
    else:
        sizes = {**SIZES, "intermediate_size": 120, "moe_intermediate_size": 40, "mlp_only_layers": [0]}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=6, norm_topk_prob=True))
    model.save_pretrained(directory)


@pytest.mark.parametrize(("family", "tensor_parallel"), [("qwen3_moe", 1), ("mixtral", 2), ("deepseek_v3", 1)])
def test_experts_arrive_bit_for_bit_and_are_what_the_engine_computes_with(
    family: str, tensor_parallel: int, tmp_path: Path
) -> None:
    for seed, name in enumerate(("one", "two")):
        write_model(family, tmp_path / name, seed)
    without_weights(tmp_path / "one", tmp_path / "bare")
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(tensor_parallel)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    seen: dict[str, Any] = torch.load(tmp_path / "seen.pt")
    assert "no weights were published to this engine yet" in seen["refusal"]
    for name, other in (("one", "two"), ("two", "one")):
        assert seen[f"{name} weights"] == []
        assert float(distances(load(tmp_path / name), seen[name]).max()) < 1e-4
        assert float(distances(load(tmp_path / other), seen[name]).max()) > 0.1
    assert seen["wrong"] == [f"{seen['changed']}: engine holds other values than were sent"]
