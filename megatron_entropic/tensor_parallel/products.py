"""Matrix products of the output head, whose results are float32 whatever the model's dtype.

Rounding logits to bfloat16 costs up to 2.6e-2 in a log-probability, and gradients summed over chunks in bfloat16 lose
as much again. A GPU's tensor cores take bfloat16 and accumulate in float32, so there the float32 result is free.
torch has no such product for a CPU: there the operands are converted, chunk by chunk, and where the processor has AMX
oneDNN is allowed to take them back to bfloat16 on the way into its tiles, which accumulate in float32 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_entropic.tensor_parallel.statistics import arithmetic_dtype


def operand(x: Tensor) -> Tensor:
    """Tensor x as it enters a product: unchanged on a GPU, on a CPU in the dtype of the arithmetic."""
    return x if x.is_cuda else x.to(arithmetic_dtype(x.dtype))


def chunk_operands(weight: Tensor, chunks: Iterator[slice]) -> Iterator[tuple[slice, Tensor]]:
    """Yields each chunk with its rows of the weight as `operand`; converted rows last until the next are asked for."""
    converted = operand(weight[:0])
    for chunk in chunks:
        rows = weight[chunk]
        if rows.dtype == converted.dtype:
            yield chunk, rows
            continue
        # The first chunk is the longest. A fresh tensor for each would cost a page fault every 4 KB.
        if len(converted) < len(rows):
            converted = torch.empty(rows.shape, dtype=converted.dtype, device=rows.device)
        yield chunk, converted[: len(rows)].copy_(rows)


def multiply(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """Compute out [m, n] = a [m, k] @ b [k, n]; out in the dtype of the arithmetic, a and b from `operand`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def multiply_add(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """Compute out [m, n] += a [m, k] @ b [k, n], dtypes as in `multiply`."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


@contextmanager
def low_precision_tiles(x: Tensor) -> Iterator[None]:
    """Let oneDNN round operands of float32 products to bfloat16 while the block runs, if x is bfloat16 on AMX.

    Hidden states and weights of such a model lose nothing by it. The gradient of the logits is rounded, as on a GPU.
    Without AMX a product of float32 is as fast as one of bfloat16, or faster.
    """
    if x.is_cuda or x.dtype != torch.bfloat16 or not has_bfloat16_tiles():
        yield
        return
    mkldnn: Any = torch.backends.mkldnn  # whose stub does not know its settings
    setting = mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def has_bfloat16_tiles() -> bool:
    """Whether this processor has AMX for bfloat16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
