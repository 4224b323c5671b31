"""Tiny models of every family, written by transformers itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # importing transformers' models takes seconds, and not every test wants one
    from transformers import PreTrainedModel

# Odd sizes, so that no two axes can be taken for each other; the vocabulary is not divisible by 2 or 4.
_SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "initializer_range": 0.5,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 6}
_LATENT = {
    "q_lora_rank": 20,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "moe_intermediate_size": 28,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
FAMILIES = ("qwen3", "qwen2", "llama", "qwen3_moe", "mixtral", "deepseek_v3")


def build_tiny(family: str, tied: bool) -> PreTrainedModel:
    """A random model whose norms and biases are not trivial either."""
    from transformers import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.manual_seed(7)
    model: PreTrainedModel
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=10, tie_word_embeddings=tied))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=tied))
    elif family == "qwen3_moe":
        # Layer 0 is dense.
        sizes = {**_SIZES, **_EXPERTS, "moe_intermediate_size": 28, "mlp_only_layers": [0], "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, head_dim=10, tie_word_embeddings=tied))
    elif family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**_SIZES, **_EXPERTS, tie_word_embeddings=tied))
    elif family == "deepseek_v3":
        # Untied, queries are made of a latent vector, tied of hidden states. Layer 0 is dense.
        sizes = {**_SIZES, **_LATENT, "num_key_value_heads": 12, **({"q_lora_rank": None} if tied else {})}
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, tie_word_embeddings=tied))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_()
    else:
        model = LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter))
    return model
