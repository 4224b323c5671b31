"""Mixtral: Llama with experts in every layer."""

from megatron_entropic.models.rows import QKV, decoder, gated_experts
from megatron_entropic.models.table import Architecture, ExpertKeys

_EXPERTS = gated_experts("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}", gate="w1", up="w3", down="w2")

MIXTRAL = Architecture(
    family="mixtral",
    hf_class="MixtralForCausalLM",
    rows=decoder(attention=(QKV,), feed_forward=_EXPERTS),
    experts=ExpertKeys(("num_local_experts", "num_experts"), "intermediate_size", renormalised=True),
    always_windowed=True,
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
)
