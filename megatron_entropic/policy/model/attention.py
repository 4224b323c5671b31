"""Core attention on torch's scaled_dot_product_attention, for packed sequences, where Transformer Engine is absent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_entropic.policy.batch.segments import SegmentGroup, SegmentPlan
from megatron_entropic.policy.model.norm import RMSNorm

if TYPE_CHECKING:
    from megatron_entropic.policy.batch.microbatch import MicroBatch


@dataclass
class PackedSegments(PackedSeqParams):
    """Parameters of attention and RoPE for a packed micro-batch: megatron-core's, and those of our own modules."""

    plan: SegmentPlan | None = None
    """Plan of the segments; it goes to the device when the first layer asks, and serves all layers from there."""
    choices: torch.Tensor | None = None
    """Experts to use (`MicroBatch.choices`); recomputation too hands these parameters to every layer."""

    def plan_on(self, device: torch.device) -> SegmentPlan:
        """The plan with its tensors on `device`."""
        assert self.plan is not None
        if self.plan.order.device != device:
            self.plan = self.plan.to(device)
        return self.plan


def packed_segments(micro_batch: MicroBatch) -> PackedSegments:
    """The attention parameters of a micro-batch."""
    first = micro_batch.first_positions
    # RoPE takes the padded starts where there are some; ours then looks for positions in a second row.
    placed = None if first is None else torch.stack((micro_batch.cu_seqlens, F.pad(first, (0, 1))))
    return PackedSegments(
        qkv_format="thd",
        cu_seqlens_q=micro_batch.cu_seqlens,
        cu_seqlens_kv=micro_batch.cu_seqlens,
        cu_seqlens_q_padded=placed,
        cu_seqlens_kv_padded=placed,
        max_seqlen_q=micro_batch.max_seqlen,
        max_seqlen_kv=micro_batch.max_seqlen,
        plan=micro_batch.plan,
        choices=micro_batch.choices,
    )


class SegmentedAttention(MegatronModule):
    """Causal grouped-query attention within each segment of a packed micro-batch, and to the prefix it goes on from.

    Segments of similar length run as one batch, padded on the right (see `segments`): under the causal mask no real
    query sees a padded key, and outputs of padded queries are dropped, so their gradients are exactly zero.

    Under context parallelism T counts this rank's rows. Keys and values of all ranks are gathered, one collective for
    both, and their gradients scattered back with one.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        self._context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        assert config.attention_dropout == 0.0
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        packed_seq_params: PackedSegments,
        **_unused: Any,
    ) -> torch.Tensor:
        """Attend within segments.

        Args:
            query: [T, query heads, head_dim].
            key: [T, key/value heads, head_dim].
            value: [T, key/value heads, value_head_dim], where heads may be narrower.
            attention_mask: None, the mask is causal.
            packed_seq_params: parameters with the plan of the T packed rows.

        Returns:
            [T, query heads * value_head_dim].
        """
        plan = packed_seq_params.plan_on(query.device)
        if self._context_group is not None:
            key, value = self._of_all_ranks(key, value)
        outputs = [self._attend(query, key, value, group) for group in plan.groups]
        packed = torch.cat(outputs).index_select(0, plan.order)
        return packed.flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: SegmentGroup) -> torch.Tensor:
        """Attend within one group; returns [count * length, query heads, value_head_dim] for its rows."""
        keys = group.rows if group.keys is None else group.keys
        q, k, v = (
            tensor.index_select(0, rows).unflatten(0, (group.count, -1)).transpose(1, 2)
            for tensor, rows in ((query, group.rows), (key, keys), (value, keys))
        )
        # Kernels that keep no matrix of scores want values as wide as keys.
        padded = F.pad(v, (0, q.shape[-1] - v.shape[-1])) if v.shape[-1] < q.shape[-1] else v
        output = attention(q, k, padded, group.mask, self.scale)
        return output[..., : v.shape[-1]].transpose(1, 2).flatten(0, 1)

    def _of_all_ranks(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather both from all ranks, [size * T, heads, width], rank after rank; backward sums gradients over ranks."""
        own = torch.cat((key, value), dim=2)
        gathered = gather_from_sequence_parallel_region(own, group=self._context_group)
        key, value = gathered.split((key.shape[2], value.shape[2]), dim=2)
        return key, value

    def sharded_state_dict(self, *_position: Any, **_options: Any) -> dict[str, Any]:
        """Return nothing: attention has no parameters."""
        return {}


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Scaled dot-product attention, causal unless there is a mask: [n, query heads, length, width] in q's dtype.

    Args:
        q: [n, query heads, length, width].
        k: [n, key/value heads, seen, width].
        v: [n, key/value heads, seen, width].
        mask: [n, 1, length, seen] bool, whether a query sees a key.
        scale: factor of the products.
    """
    if not q.is_cuda and q.dtype == torch.bfloat16:
        output: torch.Tensor = _WideAttention.apply(q, k, v, mask, scale)
        return output
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)


class _WideAttention(torch.autograd.Function):
    """torch's CPU kernel on float32 copies of bfloat16; what is kept for the backward pass is bfloat16.

    On bfloat16 itself the kernel is slower at all lengths, its backward pass three times and more, and its gradients
    are three times less exact (torch 2.13, docs/performance.md).
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        bias = None if mask is None else torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        output, log_total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.float(), k.float(), v.float(), is_causal=mask is None, attn_mask=bias, scale=scale
        )
        narrow: torch.Tensor = output.to(q.dtype)
        ctx.save_for_backward(q, k, v, narrow, log_total, bias)
        ctx.scale = scale
        return narrow

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, log_total, bias = ctx.saved_tensors
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(tensor.float() for tensor in (gradients[0], q, k, v, output)),
            log_total,
            dropout_p=0.0,
            is_causal=bias is None,
            attn_mask=bias,
            scale=ctx.scale,
        )
        return *(gradient.to(q.dtype) for gradient in found), None, None


# Multi-head latent attention: megatron-core's, with layers of ours where Transformer Engine is absent.
#
# Queries, and keys with values, are made of one vector a token each, whose matrices every tensor rank holds whole. That
# takes Transformer Engine's TELinear; megatron-core's replacement without it, a matrix cut by columns, gathers the
# shared part of the keys without summing its gradient over tensor ranks. With two of them gradients are several per
# cent off (measured with 0.16.1; 0.19.2 has the same code).


class LatentSelfAttention(MLASelfAttention):
    """megatron-core's latent self-attention, with the layers that its spec names."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Layers to build, by name: those of the spec."""
        # 0.19 asks this, and its own answer puts a norm before queries made of hidden states.
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
        """Do nothing: `load` fills the weight."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Multiply hidden [..., input] by the matrix; returns [..., output], and no bias."""
        return super().forward(hidden), None


def use_plain_layers(layer: Any, *, has_experts: bool) -> None:
    """Exchange the parts of megatron-core's own layer spec for latent attention; `layer` are the layer's submodules.

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
    """Exchange the module of a self-attention spec; its layers stay."""
    spec.module = LatentSelfAttention


def _provide_missing_name() -> None:
    """Give megatron-core a class TELinear where Transformer Engine is absent."""
    # It holds whole what is a TELinear; without Transformer Engine that name is None, or no class.
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.TELinear = ReplicatedLinear
