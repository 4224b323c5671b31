"""Qwen3 with experts (30B-A3B, 235B-A22B): attention of Qwen3, experts in all layers or in some."""

from megatron_entropic.models.rows import (
    GATED_MLP,
    QK_NORMS,
    QKV,
    decoder,
    gated_experts,
    in_dense_layers,
)
from megatron_entropic.models.table import Architecture, ExpertKeys

_EXPERTS = gated_experts("mlp.gate", "mlp.experts.{expert}", gate="gate_proj", up="up_proj", down="down_proj")

QWEN3_MOE = Architecture(
    family="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    rows=decoder(attention=(QKV, *QK_NORMS), feed_forward=(*_EXPERTS, *in_dense_layers(GATED_MLP))),
    # transformers 5 writes the second name, published checkpoints have the first.
    experts=ExpertKeys(("num_experts", "num_local_experts"), "moe_intermediate_size", renormalised="norm_topk_prob"),
    windowed_from_layer=False,
    defaults={
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
)
