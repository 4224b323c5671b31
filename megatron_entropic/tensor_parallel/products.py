"""Matrix products of the output head whose results are float32 whatever the model's dtype.

Rounding logits to bfloat16 costs up to 2.6e-2 in a log-probability, and gradients summed over chunks in bfloat16 lose
as much again. A GPU's tensor cores take bfloat16 and accumulate in float32, so there the float32 result is free.
Elsewhere the operands are converted, block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_entropic.tensor_parallel.statistics import arithmetic_dtype


def operand(x: Tensor) -> Tensor:
    """x as it enters a product: unchanged on a GPU, on a CPU in the dtype of the arithmetic."""
    return x if x.is_cuda else x.to(arithmetic_dtype(x.dtype))


def multiply(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out [m, n] = a [m, k] @ b [k, n]; out in the dtype of the arithmetic, a and b from `operand`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def multiply_add(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out [m, n] += a [m, k] @ b [k, n], dtypes as in `multiply`."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
