"""The two passes over a block of logits as Triton kernels; `triton_backend` launches them, `backends` has the formulas.

Both are bound by memory, so what matters is that every access to x is 16 bytes wide. Triton finds that out from the
arguments it has specialised (pointers, row stride and widths divisible by 16), and only if the mask of an access is
constant over 16 columns. Hence accesses are masked with the full width, and columns from `valid` on, which may begin
anywhere, are removed afterwards.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from megatron_entropic.tensor_parallel.statistics import MIN_EXPONENT

_MIN_EXPONENT = tl.constexpr(MIN_EXPONENT)
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))
_PROPAGATE_NAN = tl.constexpr(tl.PropagateNan.ALL)
"""tl.maximum would otherwise turn a NaN among the logits into probability 0."""


# `valid` only ends a loop and decides element by element; a kernel for each of its alignments would gain nothing.
@triton.jit(do_not_specialize=["valid"])
def statistics_kernel(
    x: tl.tensor,
    column: tl.tensor,
    inverse_temperature: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    width: tl.tensor,
    piece_width: tl.tensor,
    valid: tl.tensor,
    NEED_ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """m, S (and W) of one row and one piece; the program of the row's first piece also stores t.

    Each of LANES threads keeps its own m, S and W over a loop that takes DEPTH x LANES x VECTOR columns a time. So
    nothing crosses threads until the end, and sums are rescaled once for DEPTH x VECTOR columns.

    Grid: (T, P).

    Args:
        x: [T, width] row stride x_stride.
        column: [T] int64 the target's column or -1.
        inverse_temperature: [T] float32.
        out: [P * k + 1, T] float32, row stride out_stride.
        x_stride: elements.
        out_stride: elements.
        width: columns of x.
        piece_width: columns of a piece.
        valid: columns that exist.
        NEED_ENTROPY: k = 3, else 2.
        LANES: threads of the program.
        DEPTH: power of 2.
        VECTOR: elements of x in 16 bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    x += row * x_stride
    out += row
    octaves = tl.load(inverse_temperature + row) * _LOG2_E
    begin = piece * piece_width
    end = tl.minimum(begin + piece_width, valid)
    lanes = tl.arange(0, LANES)
    offsets = (tl.arange(0, DEPTH)[:, None, None] * LANES + lanes[None, :, None]) * VECTOR
    offsets += tl.arange(0, VECTOR)[None, None, :]
    m = tl.full([LANES], float("-inf"), tl.float32)
    s = tl.zeros([LANES], tl.float32)
    w = tl.zeros([LANES], tl.float32)
    for tile in range(begin, end, DEPTH * LANES * VECTOR):
        cols = tile + offsets
        inside = (cols < width) & (cols < begin + piece_width)
        values = tl.load(x + cols, mask=inside, other=float("-inf")).to(tl.float32)
        if tile + DEPTH * LANES * VECTOR > end:
            values = tl.where(cols < end, values, float("-inf"))
        tile_m = tl.maximum(m, tl.max(tl.max(values, 2), 0))
        # A lane that has seen only -inf is centred on 0, so that no difference of infinities appears.
        centre = tl.where(tile_m == float("-inf"), 0.0, tile_m)
        shift, factor = _distance_and_exp(m - centre, octaves)
        d, e = _distance_and_exp(values - centre[None, :, None], octaves)
        if NEED_ENTROPY:
            w = factor * (w + shift * s) + tl.sum(tl.sum(d * e, 2), 0)
        s = factor * s + tl.sum(tl.sum(e, 2), 0)
        m = tile_m
    maximum = tl.max(m, 0)
    shift, factor = _distance_and_exp(m - tl.where(maximum == float("-inf"), 0.0, maximum), octaves)
    rows = 3 if NEED_ENTROPY else 2
    first = out + (piece * rows).to(tl.int64) * out_stride
    tl.store(first, maximum)
    tl.store(first + out_stride, tl.sum(factor * s, 0))
    if NEED_ENTROPY:
        tl.store(first + 2 * out_stride, tl.sum(factor * (w + shift * s), 0) * _LN_2)
    if piece == 0:
        own = tl.load(column + row)
        target = tl.load(x + own, mask=own >= 0, other=0.0).to(tl.float32)
        tl.store(out + (tl.num_programs(1) * rows).to(tl.int64) * out_stride, target)


@triton.jit
def _distance_and_exp(difference: tl.tensor, octaves: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """d = difference * octaves and 2**d; of a difference of -inf d 2**d is 0, not NaN."""
    d = tl.maximum(difference * octaves, _MIN_EXPONENT, propagate_nan=_PROPAGATE_NAN)
    return d, tl.exp2(d)


@triton.jit(do_not_specialize=["valid"])
def gradient_kernel(
    x: tl.tensor,
    out: tl.tensor,
    column: tl.tensor,
    inverse_temperature: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    entropy: tl.tensor,
    g: tl.tensor,
    h: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    width: tl.tensor,
    valid: tl.tensor,
    HAS_ENTROPY_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """dL/dx of BLOCK columns of one row. `out` may be x: every element is read and written by the same thread.

    Grid: (T, width / BLOCK, rounded up).

    Args:
        x: [T, width] row stride x_stride.
        out: [T, width] row stride out_stride, of any floating dtype.
        column: [T] int64 the target's column or -1.
        inverse_temperature: [T] float32, as the five that follow.
        maximum: [T] M.
        total: [T] S.
        entropy: [T] H; read with HAS_ENTROPY_GRADIENT only.
        g: [T].
        h: [T]; read with HAS_ENTROPY_GRADIENT only.
        x_stride: elements.
        out_stride: elements.
        width: columns of x and out.
        valid: columns that exist; the others get zero.
        HAS_ENTROPY_GRADIENT: whether h counts.
        BLOCK: power of 2.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    cols = begin + tl.arange(0, BLOCK)
    inside = cols < width
    values = tl.load(x + row * x_stride + cols, mask=inside, other=float("-inf")).to(tl.float32)
    inverse = tl.load(inverse_temperature + row)
    row_total = tl.load(total + row)
    row_g = tl.load(g + row)
    scale = -inverse / row_total
    constant = row_g * scale
    d, e = _distance_and_exp(values - tl.load(maximum + row), inverse * _LOG2_E)
    if HAS_ENTROPY_GRADIENT:
        slope = tl.load(h + row) * scale
        constant += slope * (tl.load(entropy + row) - tl.log(row_total))
        dx = e * (constant + slope * _LN_2 * d)
    else:
        dx = e * constant
    own = tl.load(column + row).to(tl.int32)
    if (own >= begin) & (own < begin + BLOCK):
        dx += tl.where(cols == own, row_g * inverse, 0.0)
    if begin + BLOCK > valid:
        dx = tl.where(cols < valid, dx, 0.0)
    tl.store(out + row * out_stride + cols, dx.to(out.dtype.element_ty), mask=inside)
