"""Rows that most families share, and how a decoder is put together from them."""

from __future__ import annotations

from dataclasses import replace

from megatron_entropic.models.layouts import ColumnShard, QkvInterleaved, Replicated, RowShard, VocabularyShard
from megatron_entropic.models.table import Row

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
"""Feed-forward part of a dense layer."""


def gated_experts(router: str, expert: str, *, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Feed-forward part of a layer with experts, each a gated MLP, and a router without bias.

    Args:
        router: Hugging Face name of the router below the layer.
        expert: of an expert below the layer, with `{expert}` for its number.
        gate, up, down: of the three matrices below the expert.
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
    """Experts that every token goes through, in layers with experts: together one gated MLP, cut as a dense one.

    Args:
        shared: Hugging Face name below the layer.
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
        attention: what attention has besides its output projection.
        feed_forward: of a layer; with rows of experts and of a dense layer, each layer has one of the two.
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
    """The same rows, for those layers of a mixture of experts that have none."""
    return tuple(replace(row, layers="dense") for row in rows)
