"""What an architecture table is made of."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_entropic.weights.layouts import Layout

LAYER = "{layer}"
"""Placeholder of the global layer number in both names of a row."""


@dataclass(frozen=True)
class Row:
    """One Megatron parameter (or one per layer, if the name holds `{layer}`) and where it comes from."""

    megatron: str
    """Name in megatron-core's GPTModel with separate norm modules (local layer spec)."""
    hf: tuple[str, ...]
    layout: Layout

    @property
    def per_layer(self) -> bool:
        """Whether the row stands for one parameter in every layer."""
        return LAYER in self.megatron


@dataclass(frozen=True)
class Architecture:
    """A model family: how Hugging Face calls it and its rows in the order of the forward pass."""

    family: str
    """Also `model_type` in config.json."""
    hf_class: str
    """Entry of `architectures` in config.json."""
    rows: tuple[Row, ...]
    default_head_dim: int | None = None
    """head_dim where config.json does not say it; None: hidden_size / num_attention_heads."""

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return any(row.megatron.endswith("linear_qkv.bias") for row in self.rows)

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return any(row.megatron.endswith("q_layernorm.weight") for row in self.rows)
