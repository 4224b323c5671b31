"""Launches of the Triton kernels on a block of logits: checks, edge cases and sizes."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_entropic.tensor_parallel.statistics import GradientInputs
from megatron_entropic.tensor_parallel.triton_kernels import gradient_kernel, statistics_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of logits and gradient. The kernels calculate in float32 and would round float64 without a word."""

DEPTH = 4
"""Number of reads of 16 bytes in flight for each thread of the statistics kernel.

They hide the latency of memory and leave enough registers for six programs of four warps on a multiprocessor.
"""

COLUMNS_OF_WARP = 1024
"""Columns of a warp of the gradient kernel: four reads of 16 bytes of bfloat16 for each of its 32 threads."""

FUSED_MULTIPLY_ADD = True
"""Whether products and sums are fused; said explicitly, because Triton's default differs between versions."""


class TritonBackend:
    """Backend of Triton kernels; `backends.Backend` has the arguments."""

    def statistics(
        self, x: Tensor, column: Tensor, inverse_temperature: Tensor, *, valid: int, pieces: int, out: Tensor
    ) -> None:
        """Summarise the block with one program for each row and piece.

        Raises:
            ValueError: a dtype or a layout that the kernel does not read.
        """
        _check("logits", x)
        tokens, width = x.shape
        if tokens == 0:
            return
        piece_width = triton.cdiv(width, pieces)
        warps = _warps(piece_width)
        with torch.cuda.device_of(x):
            statistics_kernel[(tokens, pieces)](
                x,
                column.contiguous(),
                inverse_temperature.contiguous(),
                out,
                x.stride(0),
                out.stride(0),
                width,
                piece_width,
                valid,
                NEED_ENTROPY=len(out) == 3 * pieces + 1,
                LANES=32 * warps,
                DEPTH=DEPTH,
                VECTOR=16 // x.element_size(),
                num_warps=warps,
                enable_fp_fusion=FUSED_MULTIPLY_ADD,
            )
        torch.autograd.graph.increment_version(out)

    def gradient(self, x: Tensor, inputs: GradientInputs, *, valid: int, out: Tensor) -> None:
        """Compute dL/dx with one program for each row and block of columns.

        Raises:
            ValueError: a dtype or a layout that the kernel does not read or write.
        """
        _check("logits", x)
        _check("gradient", out)
        tokens, width = x.shape
        if tokens > 1 and out.stride(0) < width:
            raise ValueError(f"backend='triton' cannot write a gradient whose rows overlap (stride {out.stride(0)})")
        if tokens == 0 or width == 0:
            return
        warps, merged = _warps(width), inputs.merged
        block = warps * COLUMNS_OF_WARP
        # contiguous(): autograd hands over views, such as the expanded gradient of a sum.
        with torch.cuda.device_of(x):
            gradient_kernel[(tokens, triton.cdiv(width, block))](
                x,
                out,
                inputs.column.contiguous(),
                inputs.inverse_temperature.contiguous(),
                merged.maximum.contiguous(),
                merged.total.contiguous(),
                None if merged.entropy is None else merged.entropy.contiguous(),
                inputs.g.contiguous(),
                None if inputs.h is None else inputs.h.contiguous(),
                x.stride(0),
                out.stride(0),
                width,
                valid,
                HAS_ENTROPY_GRADIENT=inputs.h is not None,
                BLOCK=block,
                num_warps=warps,
                enable_fp_fusion=FUSED_MULTIPLY_ADD,
            )
        torch.autograd.graph.increment_version(out)


def _check(name: str, block: Tensor) -> None:
    """Refuse a block that the kernels would get wrong.

    Raises:
        ValueError: a dtype other than `DTYPES`, or columns apart.
    """
    if block.dtype not in DTYPES:
        raise ValueError(f"backend='triton' takes no {block.dtype} {name}; use backend='eager'")
    if block.shape[1] > 1 and block.stride(1) != 1:
        raise ValueError(
            f"backend='triton' needs {name} with unit stride along the vocabulary, not strides {block.stride()}: "
            "call contiguous(), or use backend='eager'"
        )


def _warps(columns: int) -> int:
    """Number of warps of a program for `columns` columns.

    Four, because larger programs leave more of their last tile unused; one where one takes all the columns. The choice
    depends on nothing else, so that a row has the same result in any batch.
    """
    return 4 if columns > COLUMNS_OF_WARP else 1
