"""The multi-head latent attention that a Hugging Face config.json describes (DeepSeek-V2, arXiv 2405.04434, 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_entropic.models.config_values import MOST_ELEMENTS, shown

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class LatentAttention:
    """Keys and values of all heads are made of one vector a token; a further part of the keys is shared by all heads.

    A head of q and k is `head_dim` wide: first what RoPE leaves alone, then `rotary_head_dim` that it turns.
    """

    query_rank: int | None
    """Width of the vector of which queries are made; None: they are made of hidden states directly."""
    key_value_rank: int
    rotary_head_dim: int
    value_head_dim: int


def latent_problems(config: Mapping[str, Any]) -> list[str]:
    """What in a config.json does not describe latent attention that can be trained."""
    problems = []
    optional = ["q_lora_rank"] if config["q_lora_rank"] is not None else []
    for key in (*_SIZES, *optional):
        value = config.get(key)
        if type(value) is not int or not 0 < value <= MOST_ELEMENTS:
            problems.append(
                f"{key} must be a positive integer{' or null' * bool(key in optional)}, found {shown(value)}"
            )
    if not problems and config["qk_rope_head_dim"] % 2:
        problems.append(f"qk_rope_head_dim={config['qk_rope_head_dim']} must be even")
    if config.get("rope_interleave", True) is not True:
        problems.append(
            f"rope_interleave={config['rope_interleave']!r}: only true is supported, RoPE of neighbouring pairs"
        )
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if groups is not None and groups != heads:
        problems.append(f"num_key_value_heads={groups} differs from num_attention_heads={heads}")
    return problems


def read_latent(config: Mapping[str, Any]) -> LatentAttention:
    """The attention of a config.json in which `latent_problems` finds nothing."""
    return LatentAttention(
        query_rank=config["q_lora_rank"],
        key_value_rank=config["kv_lora_rank"],
        rotary_head_dim=config["qk_rope_head_dim"],
        value_head_dim=config["v_head_dim"],
    )
