"""Multi-head latent attention: megatron-core's, with layers of ours where Transformer Engine is absent.

Queries, and keys with values, are made of one vector a token each, whose matrices every tensor rank holds whole. That
takes Transformer Engine's TELinear; megatron-core's replacement without it, a matrix cut by columns, gathers the shared
part of the keys without summing its gradient over tensor ranks. With two of them gradients are several per cent off
(measured with 0.16.1; 0.19.2 has the same code).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_entropic.policy.model.norms import RMSNorm


class LatentSelfAttention(MLASelfAttention):
    """megatron-core's, with the layers that its spec names."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """0.19 asks this which layers to build, and its own answer puts a norm before queries made of hidden states."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


class ReplicatedLinear(torch.nn.Linear):
    """A matrix that every tensor rank holds whole, with TELinear's constructor and result."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **_unused: Any) -> None:
        device = torch.cuda.current_device()
        super().__init__(input_size, output_size, bias=False, dtype=config.params_dtype, device=device)
        # Each tensor rank has its own tokens, so `finalize_model_grads` must sum the gradient over them.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (torch types no such mark)

    def reset_parameters(self) -> None:
        """Nothing: `load_weights` fills it."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """[..., input] -> [..., output], and no bias."""
        return super().forward(hidden), None


def use_plain_layers(layer: Any, *, has_experts: bool) -> None:
    """Exchanges what megatron-core's own layer spec has for latent attention; `layer` are the layer's submodules.

    Checkpoints call norms as Transformer Engine's layers do, which fuse them into the matrix that follows.
    """
    _provide_missing_name()
    use_own_attention(layer.self_attention)
    attention = layer.self_attention.submodules
    attention.linear_q_down_proj = attention.linear_kv_down_proj = ReplicatedLinear
    attention.q_layernorm = attention.kv_layernorm = RMSNorm
    layer.sharded_state_dict_keys_map = {
        "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
        "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        **({} if has_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
    }


def use_own_attention(spec: ModuleSpec) -> None:
    """Exchanges the module of a self-attention spec, its layers stay."""
    spec.module = LatentSelfAttention


def _provide_missing_name() -> None:
    """megatron-core holds whole what is a TELinear; without Transformer Engine that name is None, or no class."""
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.TELinear = ReplicatedLinear
