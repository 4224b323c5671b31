"""config.json of a small Qwen3, for checks that read sizes."""

from __future__ import annotations

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 17,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
