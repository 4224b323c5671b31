"""Qwen3, dense: RMS norms on each head of q and k."""

from megatron_entropic.models.rows import GATED_MLP, QK_NORMS, QKV, decoder
from megatron_entropic.models.table import Architecture

QWEN3 = Architecture(
    family="qwen3",
    hf_class="Qwen3ForCausalLM",
    rows=decoder(attention=(QKV, *QK_NORMS), feed_forward=GATED_MLP),
    defaults={"num_key_value_heads": 32, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
)
