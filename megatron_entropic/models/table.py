"""What an architecture table is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_entropic.models.layouts import Layout

LAYER = "{layer}"
"""Placeholder of the global layer number in both names of a row."""
EXPERT = "{expert}"
"""Placeholder of the global number of an expert within its layer."""


@dataclass(frozen=True)
class Row:
    """One Megatron parameter (or one per layer or expert, if the name has a place for the number) and its origin."""

    megatron: str
    """Name in megatron-core's GPTModel with separate norm modules (local layer spec)."""
    hf: tuple[str, ...]
    layout: Layout
    layers: Literal["all", "dense", "sparse"] = "all"
    """Which layers of a mixture of experts have it; sparse ones are those with experts."""
    query: Literal["any", "direct", "latent"] = "any"
    """With latent attention: which models have it, those that make queries of hidden states or of a latent vector."""
    buffer: bool = False
    """Whether it is no parameter but a float32 buffer, which no step changes and no dtype of the model rounds."""

    @property
    def per_layer(self) -> bool:
        """Whether the row stands for one parameter in every layer that has it."""
        return LAYER in self.megatron

    @property
    def per_expert(self) -> bool:
        """Whether it stands for one parameter of every expert."""
        return EXPERT in self.megatron


@dataclass(frozen=True)
class ExpertKeys:
    """Where config.json tells about experts; keys of transformers' config class of the family."""

    count: tuple[str, ...]
    """Names of the key of the number of experts of a layer, of which one is present."""
    ffn: str
    """Key of the width of one expert."""
    renormalised: bool | str
    """Whether the weights of a token's experts are scaled to add up to 1, or the key that says so."""
    first_layer: str | None = None
    """Key of the number of layers without experts at the beginning; None: the family has no such key."""
    sigmoid: bool = False
    """Whether experts are chosen as in DeepSeek-V3 (`SigmoidRouting`) and shared ones added; brings keys of its own."""


@dataclass(frozen=True)
class Architecture:
    """A model family: how Hugging Face calls it and its rows in the order of the forward pass."""

    family: str
    """Also `model_type` in config.json."""
    hf_class: str
    """Entry of `architectures` in config.json."""
    rows: tuple[Row, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers' config class of the family has for keys that config.json leaves out."""
    experts: ExpertKeys | None = None
    """None for dense families."""
    always_windowed: bool = False
    """A `sliding_window` in config.json is in use unless it is null; other families have a switch for it."""
    windowed_from_layer: bool = True
    """Whether the switch is for layers from `max_window_layers` on; all layers otherwise."""

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return any(row.megatron.endswith("linear_qkv.bias") for row in self.rows)

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return any(row.megatron.endswith(".k_layernorm.weight") for row in self.rows)

    @property
    def latent(self) -> bool:
        """Whether keys and values are made of one latent vector a token (multi-head latent attention)."""
        return any(row.megatron.endswith("linear_kv_down_proj.weight") for row in self.rows)
