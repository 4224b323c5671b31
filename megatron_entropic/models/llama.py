"""Llama 2 and 3.x, dense."""

from megatron_entropic.models.rows import GATED_MLP, QKV, decoder
from megatron_entropic.models.table import Architecture

LLAMA = Architecture(
    family="llama",
    hf_class="LlamaForCausalLM",
    rows=decoder(attention=(QKV,), feed_forward=GATED_MLP),
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
)
