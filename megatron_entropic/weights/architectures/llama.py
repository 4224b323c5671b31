"""Llama 2 and 3.x, dense."""

from megatron_entropic.weights.architectures.table import Architecture, Row
from megatron_entropic.weights.layouts import ColumnShard, QkvInterleaved, Replicated, RowShard, VocabularyShard

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."

LLAMA = Architecture(
    family="llama",
    hf_class="LlamaForCausalLM",
    rows=(
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VocabularyShard(("vocab", "hidden"))),
        Row(_MEGATRON + "input_layernorm.weight", (_HF + "input_layernorm.weight",), Replicated(("hidden",))),
        Row(
            _MEGATRON + "self_attention.linear_qkv.weight",
            tuple(f"{_HF}self_attn.{x}_proj.weight" for x in "qkv"),
            QkvInterleaved(input="hidden"),
        ),
        Row(
            _MEGATRON + "self_attention.linear_proj.weight",
            (_HF + "self_attn.o_proj.weight",),
            RowShard(("hidden", "query")),
        ),
        Row(
            _MEGATRON + "pre_mlp_layernorm.weight",
            (_HF + "post_attention_layernorm.weight",),
            Replicated(("hidden",)),
        ),
        Row(
            _MEGATRON + "mlp.linear_fc1.weight",
            (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
            ColumnShard(("ffn", "ffn"), "hidden"),
        ),
        Row(_MEGATRON + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), RowShard(("hidden", "ffn"))),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated(("hidden",))),
        Row("output_layer.weight", ("lm_head.weight",), VocabularyShard(("vocab", "hidden"))),
    ),
)
