"""RMSNorm for the layers where Transformer Engine is absent.

    r = 1 / sqrt(mean(x^2) + eps)     y = w x r     dx = r (w dy - x r mean(w dy x r))     dw = sum(dy x r)

torch has no CPU kernel for it: rms_norm is a chain of operations, which autograd differentiates one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20
"""Bytes of a buffer: the three of the backward pass stay in the 2 MB second-level cache of a core, or nearly."""


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor, usable under sequence parallelism.

    megatron-core's own wrapper of torch norms refuses sequence parallelism. What it takes is the mark below: each
    tensor rank normalises its own tokens, so `finalize_model_grads` must sum the weight's gradient over them.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, **_unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (torch types no such mark)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., hidden_size] of any dtype; the arithmetic is float32."""
        if x.is_cuda or x.dtype != torch.bfloat16:
            return super().forward(x)
        normalised: Tensor = _RowNorm.apply(x, self.weight, self.eps)
        return normalised


class _RowNorm(torch.autograd.Function):
    """RMSNorm on a CPU, chunk of rows by chunk of rows; keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        rows, result = x.flatten(0, -2), torch.empty_like(x)
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        buffer = _buffers(1, rows)[0]
        for some in _chunks(rows):
            scaled = buffer[: some.stop - some.start].copy_(rows[some])
            scaled.mul_(inverse[some]).mul_(weight)
            result.flatten(0, -2)[some] = scaled
        ctx.save_for_backward(x, weight, inverse)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        rows, incoming, dx = x.flatten(0, -2), gradients[0].flatten(0, -2), torch.empty_like(x)
        factor = weight.float()
        dweight = torch.zeros_like(factor)
        buffers = _buffers(3, rows)
        for some in _chunks(rows):
            unit, dy, product = buffers[:, : some.stop - some.start]
            unit.copy_(rows[some]).mul_(inverse[some])
            torch.mul(unit, dy.copy_(incoming[some]), out=product)
            if ctx.needs_input_grad[1]:
                dweight += product.sum(0)
            along = torch.mv(product, factor).div_(x.shape[-1]).unsqueeze(1)
            dy.mul_(factor).addcmul_(unit, along, value=-1).mul_(inverse[some])
            dx.flatten(0, -2)[some] = dy
        return dx, dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Yields slices of rows [N, H] whose float32 copy fits a buffer."""
    size = max(1, CHUNK_BYTES // (4 * rows.shape[1]))
    for begin in range(0, len(rows), size):
        yield slice(begin, min(begin + size, len(rows)))


def _buffers(count: int, rows: Tensor) -> Tensor:
    """Uninitialised buffers, [count, rows of a chunk, H] float32."""
    longest = max((some.stop - some.start for some in _chunks(rows)), default=0)
    return torch.empty(count, longest, rows.shape[1], dtype=torch.float32)
