"""RoPE of packed sequences in one gather, and Llama 3's frequencies.

megatron-core applies RoPE to packed sequences one segment after the other; with hundreds of short segments that loop
costs more than the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_entropic.policy.batch.segments import ContextCut


def apply_rotary_packed(
    tensor: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    *_unused: Any,
    cp_group: dist.ProcessGroup,
    multi_latent_attention: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    **_options: Any,
) -> torch.Tensor:
    """Stand-in for megatron-core's `_apply_rotary_pos_emb_thd`, with its arguments.

    Args:
        tensor: [T / size, heads, head_dim] for `size` context-parallel ranks, all of which is rotated, in halves
            (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
        cu_seqlens: [segments + 1] int32; the last is T. Or [2, segments + 1] with, in a second row, the position of
            each segment's first token, which is 0 otherwise; without context parallelism only.
        freqs: [max_s, 1, 1, head_dim] angles in float32, by position within a segment.
        cp_group: context-parallel group.
        multi_latent_attention, mla_rotary_interleaved: in 0.16, in 0.19: neighbouring elements are the pairs that are
            rotated; the result has halves all the same, of q as of k.
        mscale: factor of cosine and sine.
    """
    positions = _positions(cu_seqlens, ContextCut(cp_group.rank(), cp_group.size()), len(tensor))
    # [max_s, 1, d] before the gather: the cosine is taken once for each position, not for each token.
    cos = (freqs.squeeze(2).cos() * mscale).to(tensor.dtype)[positions]
    sin = (freqs.squeeze(2).sin() * mscale).to(tensor.dtype)[positions]
    if multi_latent_attention or mla_rotary_interleaved:
        tensor = torch.cat((tensor[..., 0::2], tensor[..., 1::2]), dim=-1)
    if not tensor.is_cuda:
        rotated: torch.Tensor = _Rotation.apply(tensor, cos, sin)
        return rotated
    first, second = tensor.chunk(2, dim=-1)
    return tensor * cos + torch.cat((-second, first), dim=-1) * sin


def _positions(cu_seqlens: torch.Tensor, cut: ContextCut, tokens: int) -> torch.Tensor:
    """Position of each of this rank's tokens in its sequence, [tokens] int64."""
    if cu_seqlens.dim() == 1:
        return cut.positions(cu_seqlens.long().diff(), tokens)
    starts, first = cu_seqlens.long()
    lengths = starts.diff()
    return cut.positions(lengths, tokens) + first[:-1].repeat_interleave(lengths, output_size=tokens)


class _Rotation(torch.autograd.Function):
    """Rotation (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) of halves in four passes over them, and back in four."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The halves of the angles are equal, so that the transpose is the rotation back.
        return _rotated(gradients[0], cos, -sin), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    (x1, x2), (y1, y2), (c1, c2), (s1, s2) = (tensor.chunk(2, dim=-1) for tensor in (x, result, cos, sin))
    torch.mul(x1, c1, out=y1)
    y1.addcmul_(x2, s1, value=-1)
    torch.mul(x2, c2, out=y2)
    y2.addcmul_(x1, s2)
    return result


def angles_of_rank(angles: torch.Tensor, dim: int, cp_group: dist.ProcessGroup) -> torch.Tensor:
    """Stand-in for megatron-core's `get_pos_emb_on_this_cp_rank`: this context-parallel rank's two chunks of `dim`."""
    chunks = angles.chunk(2 * cp_group.size(), dim=dim)
    return torch.cat([chunks[index] for index in ContextCut(cp_group.rank(), cp_group.size()).chunks], dim=dim)


def scale_frequencies(rotary: Any, rope_scaling: dict[str, Any]) -> None:
    """Give a megatron-core RotaryEmbedding Llama 3's frequencies, with the parameters of config.json.

    The formula is megatron-core's; its constructor exposes only the factor, not the three other parameters.
    """
    rotary.inv_freq = rotary._apply_scaling(
        rotary.inv_freq,
        factor=rope_scaling["factor"],
        low_freq_factor=rope_scaling["low_freq_factor"],
        high_freq_factor=rope_scaling["high_freq_factor"],
        original_max_position_embeddings=rope_scaling["original_max_position_embeddings"],
    )
