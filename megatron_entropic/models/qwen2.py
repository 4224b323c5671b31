"""Qwen2 and Qwen2.5, dense: biases on q, k and v."""

from megatron_entropic.models.rows import GATED_MLP, QKV, QKV_BIAS, decoder
from megatron_entropic.models.table import Architecture

QWEN2 = Architecture(
    family="qwen2",
    hf_class="Qwen2ForCausalLM",
    rows=decoder(attention=(QKV, QKV_BIAS), feed_forward=GATED_MLP),
    defaults={"num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
)
