"""DeepSeek-V3 and models of its architecture (Moonlight): latent attention, sigmoid routing, shared experts."""

from megatron_entropic.models.layouts import Replicated
from megatron_entropic.models.rows import (
    GATED_MLP,
    HF_LAYER,
    LATENT_ATTENTION,
    MEGATRON_LAYER,
    decoder,
    gated_experts,
    in_dense_layers,
    shared_experts,
)
from megatron_entropic.models.table import Architecture, ExpertKeys, Row

_EXPERTS = gated_experts("mlp.gate", "mlp.experts.{expert}", gate="gate_proj", up="up_proj", down="down_proj")
_BIAS = Row(
    MEGATRON_LAYER + "mlp.router.expert_bias",
    (HF_LAYER + "mlp.gate.e_score_correction_bias",),
    Replicated(("experts",)),
    layers="sparse",
    buffer=True,
)

DEEPSEEK_V3 = Architecture(
    family="deepseek_v3",
    hf_class="DeepseekV3ForCausalLM",
    rows=decoder(
        attention=LATENT_ATTENTION,
        feed_forward=(_BIAS, *_EXPERTS, *shared_experts("mlp.shared_experts"), *in_dense_layers(GATED_MLP)),
    ),
    experts=ExpertKeys(
        ("n_routed_experts", "num_local_experts"),
        "moe_intermediate_size",
        renormalised="norm_topk_prob",
        first_layer="first_k_dense_replace",
        sigmoid=True,
    ),
    defaults={
        "num_key_value_heads": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_nextn_predict_layers": 1,
    },
)
