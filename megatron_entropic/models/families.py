"""Model families, each a table of rows; a new family is one more table and one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_entropic.models.layouts import ColumnShard, Layout, QkvInterleaved, Replicated, RowShard, VocabularyShard

# What an architecture table is made of.

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
    """Layers of a mixture of experts that have the parameter; sparse ones are those with experts."""
    query: Literal["any", "direct", "latent"] = "any"
    """Models with latent attention that have it: those that make queries of hidden states, or of a latent vector."""
    buffer: bool = False
    """Whether the row is a float32 buffer, not a parameter: no step changes it and no dtype of the model rounds it."""

    @property
    def per_layer(self) -> bool:
        """Whether the row stands for one parameter in every layer that has it."""
        return LAYER in self.megatron

    @property
    def per_expert(self) -> bool:
        """Whether the row stands for one parameter of every expert."""
        return EXPERT in self.megatron


@dataclass(frozen=True)
class ExpertKeys:
    """Keys of config.json that describe experts, as transformers' config class of the family names them."""

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
    """Name of the family, which is also `model_type` in config.json."""
    hf_class: str
    """Entry of `architectures` in config.json."""
    rows: tuple[Row, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that transformers' config class of the family has for keys that config.json leaves out."""
    experts: ExpertKeys | None = None
    """Keys that describe the experts; None for dense families."""
    always_windowed: bool = False
    """Whether a `sliding_window` in config.json is in use unless it is null; other families have a switch for it."""
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


# Rows that most families share, and how a decoder is put together from them.

MEGATRON_LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."

QKV = Row(
    MEGATRON_LAYER + "self_attention.linear_qkv.weight",
    tuple(f"{HF_LAYER}self_attn.{x}_proj.weight" for x in "qkv"),
    QkvInterleaved(input="hidden"),
)
QKV_BIAS = Row(
    MEGATRON_LAYER + "self_attention.linear_qkv.bias",
    tuple(f"{HF_LAYER}self_attn.{x}_proj.bias" for x in "qkv"),
    QkvInterleaved(input=None),
)
QK_NORMS = tuple(
    Row(
        f"{MEGATRON_LAYER}self_attention.{x}_layernorm.weight",
        (f"{HF_LAYER}self_attn.{x}_norm.weight",),
        Replicated(("head",)),
    )
    for x in "qk"
)
_ATTENTION, _HF_ATTENTION = MEGATRON_LAYER + "self_attention.", HF_LAYER + "self_attn."
LATENT_ATTENTION = (
    Row(
        _ATTENTION + "linear_q_proj.weight",
        (_HF_ATTENTION + "q_proj.weight",),
        ColumnShard(("query",), "hidden"),
        query="direct",
    ),
    Row(
        _ATTENTION + "linear_q_down_proj.weight",
        (_HF_ATTENTION + "q_a_proj.weight",),
        Replicated(("query_latent", "hidden")),
        query="latent",
    ),
    Row(
        _ATTENTION + "linear_q_up_proj.weight",
        (_HF_ATTENTION + "q_b_proj.weight",),
        ColumnShard(("query",), "query_latent"),
        query="latent",
    ),
    Row(
        _ATTENTION + "linear_kv_down_proj.weight",
        (_HF_ATTENTION + "kv_a_proj_with_mqa.weight",),
        Replicated(("key_value_latent_and_rotary", "hidden")),
    ),
    Row(
        _ATTENTION + "linear_kv_up_proj.weight",
        (_HF_ATTENTION + "kv_b_proj.weight",),
        ColumnShard(("key_value_unrotated",), "key_value_latent"),
    ),
    Row(
        _ATTENTION + "q_layernorm.weight",
        (_HF_ATTENTION + "q_a_layernorm.weight",),
        Replicated(("query_latent",)),
        query="latent",
    ),
    Row(
        _ATTENTION + "kv_layernorm.weight",
        (_HF_ATTENTION + "kv_a_layernorm.weight",),
        Replicated(("key_value_latent",)),
    ),
)
"""Multi-head latent attention of DeepSeek-V2 and V3, in megatron-core's MLASelfAttention."""
GATED_MLP = (
    Row(
        MEGATRON_LAYER + "mlp.linear_fc1.weight",
        (HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
        ColumnShard(("ffn", "ffn"), "hidden"),
    ),
    Row(MEGATRON_LAYER + "mlp.linear_fc2.weight", (HF_LAYER + "mlp.down_proj.weight",), RowShard(("hidden", "ffn"))),
)
"""Rows of the feed-forward part of a dense layer."""


def gated_experts(router: str, expert: str, *, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Rows of the feed-forward part of a layer with experts, each a gated MLP, and a router without bias.

    Args:
        router: Hugging Face name of the router below the layer.
        expert: Hugging Face name of an expert below the layer, with `{expert}` for its number.
        gate, up, down: Hugging Face names of the three matrices below the expert.
    """
    megatron, hf = MEGATRON_LAYER + "mlp.experts.local_experts.{expert}.", f"{HF_LAYER}{expert}."
    rows = (
        Row(MEGATRON_LAYER + "mlp.router.weight", (f"{HF_LAYER}{router}.weight",), Replicated(("experts", "hidden"))),
        Row(
            megatron + "linear_fc1.weight",
            (f"{hf}{gate}.weight", f"{hf}{up}.weight"),
            ColumnShard(("expert_ffn", "expert_ffn"), "hidden"),
        ),
        Row(megatron + "linear_fc2.weight", (f"{hf}{down}.weight",), RowShard(("hidden", "expert_ffn"))),
    )
    return tuple(replace(row, layers="sparse") for row in rows)


def shared_experts(shared: str) -> tuple[Row, ...]:
    """Rows of the experts that every token goes through, in layers with experts.

    Together they are one gated MLP, cut as a dense one.

    Args:
        shared: Hugging Face name of the shared experts below the layer.
    """
    megatron, hf = MEGATRON_LAYER + "mlp.shared_experts.", f"{HF_LAYER}{shared}."
    rows = (
        Row(
            megatron + "linear_fc1.weight",
            (hf + "gate_proj.weight", hf + "up_proj.weight"),
            ColumnShard(("shared_ffn", "shared_ffn"), "hidden"),
        ),
        Row(megatron + "linear_fc2.weight", (hf + "down_proj.weight",), RowShard(("hidden", "shared_ffn"))),
    )
    return tuple(replace(row, layers="sparse") for row in rows)


def decoder(*, attention: tuple[Row, ...], feed_forward: tuple[Row, ...]) -> tuple[Row, ...]:
    """All rows of a decoder with RMS norms before attention and feed-forward part.

    Args:
        attention: rows of attention besides its output projection.
        feed_forward: rows of the feed-forward part; with rows of experts and of a dense layer, each layer has one of
            the two.
    """
    embedding, hidden = VocabularyShard(("vocab", "hidden")), Replicated(("hidden",))
    return (
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), embedding),
        Row(MEGATRON_LAYER + "input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",), hidden),
        *attention,
        Row(
            MEGATRON_LAYER + "self_attention.linear_proj.weight",
            (HF_LAYER + "self_attn.o_proj.weight",),
            RowShard(("hidden", "attended")),
        ),
        Row(MEGATRON_LAYER + "pre_mlp_layernorm.weight", (HF_LAYER + "post_attention_layernorm.weight",), hidden),
        *feed_forward,
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), hidden),
        Row("output_layer.weight", ("lm_head.weight",), embedding),
    )


def in_dense_layers(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The same rows, for the layers without experts in a mixture of experts."""
    return tuple(replace(row, layers="dense") for row in rows)


# Llama 2 and 3.x, dense.

LLAMA = Architecture(
    family="llama",
    hf_class="LlamaForCausalLM",
    rows=decoder(attention=(QKV,), feed_forward=GATED_MLP),
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
)


# Qwen2 and Qwen2.5, dense: biases on q, k and v.

QWEN2 = Architecture(
    family="qwen2",
    hf_class="Qwen2ForCausalLM",
    rows=decoder(attention=(QKV, QKV_BIAS), feed_forward=GATED_MLP),
    defaults={"num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
)


# Qwen3, dense: RMS norms on each head of q and k.

QWEN3 = Architecture(
    family="qwen3",
    hf_class="Qwen3ForCausalLM",
    rows=decoder(attention=(QKV, *QK_NORMS), feed_forward=GATED_MLP),
    defaults={"num_key_value_heads": 32, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
)


# Qwen3 with experts (30B-A3B, 235B-A22B): attention of Qwen3, experts in all layers or in some.

_QWEN3_EXPERTS = gated_experts("mlp.gate", "mlp.experts.{expert}", gate="gate_proj", up="up_proj", down="down_proj")

QWEN3_MOE = Architecture(
    family="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    rows=decoder(attention=(QKV, *QK_NORMS), feed_forward=(*_QWEN3_EXPERTS, *in_dense_layers(GATED_MLP))),
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


# Mixtral: Llama with experts in every layer.

_MIXTRAL_EXPERTS = gated_experts(
    "block_sparse_moe.gate", "block_sparse_moe.experts.{expert}", gate="w1", up="w3", down="w2"
)

MIXTRAL = Architecture(
    family="mixtral",
    hf_class="MixtralForCausalLM",
    rows=decoder(attention=(QKV,), feed_forward=_MIXTRAL_EXPERTS),
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


# DeepSeek-V3 and models of its architecture (Moonlight): latent attention, sigmoid routing, shared experts.

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


_ALL = (QWEN3, QWEN2, LLAMA, QWEN3_MOE, MIXTRAL, DEEPSEEK_V3)
ARCHITECTURES = {architecture.family: architecture for architecture in _ALL}

__all__ = ["ARCHITECTURES", "Architecture", "ExpertKeys", "Row"]
