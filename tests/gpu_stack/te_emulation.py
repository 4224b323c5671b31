"""Transformer Engine's bindings in PyTorch on a CPU: what its Python needs to run a policy forward and backward.

Numbers are those of float32 arithmetic on the CPU; what is tested is everything above the bindings.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import math
from collections import Counter
from types import CodeType
from typing import Any

import te_bindings
import te_fused_attention
import torch

CALLS: Counter[str] = Counter()
"""How often each emulated function was called."""
Tensors = list[list[torch.Tensor]]


def install() -> Any:
    """As `te_bindings.install`, with functions that compute."""
    bindings = te_bindings.install(_prepare)
    permutation: Any = importlib.import_module("transformer_engine.pytorch.permutation")
    for function in (moe_permute_with_probs, moe_unpermute, moe_sort_chunks_by_index_with_probs):
        setattr(permutation, function.__name__, _counted(function))
    permutation.moe_sort_chunks_by_index = _counted(moe_sort_chunks_by_index)
    utils: Any = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    choose = utils.get_attention_backend

    def choose_as_for_bfloat16(parameters: Any) -> Any:
        return choose(dataclasses.replace(parameters, qkv_dtype=torch.bfloat16))

    utils.get_attention_backend = choose_as_for_bfloat16
    backends: Any = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.backends")
    refuses_float32: Any = inspect.unwrap(backends.FusedAttention.forward)
    refuses_float32.__code__ = _with_float32(refuses_float32.__code__)
    te_fused_attention.gather_in_the_backward_ring()
    return bindings


def _with_float32(code: CodeType) -> CodeType:
    """The same code, in which float32 is called by the name of float16."""
    return code.replace(
        co_names=tuple("float32" if name == "float16" else name for name in code.co_names),
        co_consts=tuple(_with_float32(value) if isinstance(value, CodeType) else value for value in code.co_consts),
    )


def _prepare(bindings: Any) -> None:
    thd = int(bindings.NVTE_QKV_Format.NVTE_THD)

    def fused_rope_forward(*arguments: Any) -> torch.Tensor:
        assert int(arguments[3]) == thd, "only packed sequences"
        assert not arguments[4], "not interleaved"
        return rotate(arguments[0], arguments[1], arguments[5], arguments[6], arguments[7], 1.0)

    def fused_rope_backward(*arguments: Any) -> torch.Tensor:
        return rotate(arguments[0], arguments[1], arguments[5], arguments[6], arguments[7], -1.0)

    for function in (
        rmsnorm_fwd,
        rmsnorm_bwd,
        generic_gemm,
        te_general_grouped_gemm,
        fused_rope_forward,
        fused_rope_backward,
        convert_thd_to_bshd,
        convert_bshd_to_thd,
        multi_tensor_adam,
        multi_tensor_scale,
        multi_tensor_scale_tensor,
        multi_tensor_l2norm,
        thd_get_partitioned_indices,
        *te_fused_attention.FUNCTIONS,
    ):
        setattr(bindings, function.__name__, _counted(function))
    # What cuDNN has for bfloat16, which is what a GPU runs; the arithmetic here is float32.
    backend = (int(bindings.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen), "emulated")
    bindings.get_fused_attn_backend = lambda *_: backend
    bindings.get_cudnn_version = lambda: 92000
    bindings.get_cublasLt_version = lambda: 130100
    bindings.get_num_cublas_streams = lambda: 4


def _counted(function: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        CALLS[function.__name__] += 1
        return function(*arguments, **options)

    return call


def rmsnorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    out: Any,
    _quantizer: Any,
    _dtype: Any,
    _margin: int,
    one: bool,
) -> list[Any]:
    """[y, None, 1 / root mean square of each row]."""
    inverse = (x.float().square().mean(-1) + epsilon).rsqrt()
    y = (x.float() * inverse[:, None] * (weight.float() + one)).to(x.dtype)
    return [y if out is None else out.copy_(y), None, inverse]


def rmsnorm_bwd(
    dy: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, _margin: int, one: bool
) -> list[torch.Tensor]:
    """[gradient of x, gradient of weight]."""
    normed = x.float() * inverse[:, None]
    scaled = dy.float() * (weight.float() + one)
    dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * inverse[:, None]
    return [dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype)]


def _product(a: torch.Tensor, transpose_a: bool, b: torch.Tensor, transpose_b: bool) -> torch.Tensor:
    """CuBLAS's column-major a x b, which in rows is b x a."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return (b.t() if transpose_b else b) @ (a.t() if transpose_a else a)


def generic_gemm(
    a: torch.Tensor,
    transpose_a: bool,
    b: torch.Tensor,
    transpose_b: bool,
    out: torch.Tensor | None,
    *rest: Any,
    **_: Any,
) -> tuple[Any, ...]:
    """(product, gradient of the bias, None, None)."""
    _quantizer, _dtype, bias, _bias_dtype, gelu, _gelu_in, grad, _space, _size, accumulate, *_more = rest
    assert not gelu
    result = _product(a, transpose_a, b, transpose_b)
    if bias is not None and not grad:
        result = result + bias
    if out is not None:
        result = result.view_as(out).to(out.dtype)
        CALLS["products added to a buffer"] += int(bool(accumulate))
        result = out.add_(result) if accumulate else out.copy_(result)
    elif not transpose_b and b.dim() > 2:
        result = result.view(*b.shape[:-1], -1)
    bias_gradient = b.reshape(-1, b.shape[-1]).sum(0) if grad and bias is not None else None
    return result, bias_gradient, None, None


def te_general_grouped_gemm(
    a: list[torch.Tensor],
    transpose_a: bool,
    b: list[torch.Tensor],
    transpose_b: bool,
    out: list[torch.Tensor],
    *rest: Any,
) -> list[torch.Tensor]:
    """One product for each expert, into one tensor of all rows or into one tensor each; returns the biases."""
    _dtype, splits, bias, _bias_dtype, single_output, _gelu, grad, _space, _size, accumulate, *_more = rest
    targets = list(out[0].split(list(splits))) if single_output else out
    for index, (left, right, target) in enumerate(zip(a, b, targets, strict=True)):
        if right.numel() == 0 and not transpose_b:
            continue
        result = _product(left, transpose_a, right, transpose_b)
        if not grad and bias[index].numel():
            result = result + bias[index]
        result = result.view_as(target).to(target.dtype)
        _ = target.add_(result) if accumulate else target.copy_(result)
    return bias


def _local_positions(cu_seqlens: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """Position within its sequence of every token of a context rank; each sequence is cut into 2 x size chunks."""
    parts = []
    for length in cu_seqlens.long().diff().tolist():
        chunk = length // (2 * size)
        first, second = rank * chunk, (2 * size - 1 - rank) * chunk
        if size == 1:
            parts.append(torch.arange(length))
        else:
            parts += [torch.arange(first, first + chunk), torch.arange(second, second + chunk)]
    return torch.cat(parts)


def rotate(
    x: torch.Tensor, angles: torch.Tensor, cu_seqlens: torch.Tensor, size: int, rank: int, sign: float
) -> torch.Tensor:
    """RoPE of packed sequences; `sign` -1 is its gradient. What lies behind the rotated elements stays."""
    positions = _local_positions(cu_seqlens, size, rank)
    assert positions.numel() == x.shape[0], (positions.numel(), x.shape)
    chosen = angles.reshape(angles.shape[0], -1)[positions][:, None, :]
    rotated, kept = x[..., : chosen.shape[-1]].float(), x[..., chosen.shape[-1] :]
    first, second = rotated.chunk(2, -1)
    turned = rotated * chosen.cos() + sign * torch.cat((-second, first), -1) * chosen.sin()
    return torch.cat((turned.to(x.dtype), kept), -1)


def convert_thd_to_bshd(packed: torch.Tensor, cu_seqlens: torch.Tensor, batch: int, longest: int) -> torch.Tensor:
    """[tokens, ...] -> [batch, longest, ...], padded with zeros."""
    out = packed.new_zeros(batch, longest, *packed.shape[1:])
    borders = cu_seqlens.tolist()
    for index, (start, end) in enumerate(itertools.pairwise(borders)):
        out[index, : end - start] = packed[start:end]
    return out


def convert_bshd_to_thd(padded: torch.Tensor, cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """[batch, longest, ...] -> [tokens, ...]."""
    lengths = cu_seqlens.diff().tolist()
    packed = torch.cat([padded[index, :length] for index, length in enumerate(lengths)])
    assert packed.shape[0] == tokens
    return packed


def thd_get_partitioned_indices(cu_seqlens: torch.Tensor, tokens: int, size: int, rank: int) -> torch.Tensor:
    """Places in the packed batch of the tokens of a context rank."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    assert int(cu_seqlens[-1]) == tokens
    return (_local_positions(cu_seqlens, size, rank) + starts.repeat_interleave(lengths // size)).int()


def multi_tensor_adam(
    _chunk: int,
    _noop: torch.Tensor,
    lists: Tensors,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    *rest: Any,
) -> None:
    """AdamW in place on float32 parameters (the fifth list) or on the parameters themselves."""
    step, decoupled, corrected, decay = rest
    assert decoupled
    assert corrected
    gradients, parameters, averages, squares, *main = lists
    for index, gradient in enumerate(gradients):
        value, average, square = (main[0] if main else parameters)[index], averages[index], squares[index]
        average.lerp_(gradient.float(), 1 - beta1)
        square.mul_(beta2).addcmul_(gradient.float(), gradient.float(), value=1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt() + epsilon
        value.sub_(rate * (average / (1 - beta1**step) / denominator + decay * value))
        if main:
            parameters[index].copy_(value)


def multi_tensor_scale(_chunk: int, _noop: torch.Tensor, lists: Tensors, scale: float) -> None:
    """Second list = first list x scale."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(chunk: int, noop: torch.Tensor, lists: Tensors, scale: torch.Tensor) -> None:
    """As `multi_tensor_scale`, by a tensor of one element."""
    multi_tensor_scale(chunk, noop, lists, float(scale))


def multi_tensor_l2norm(
    _chunk: int, _noop: torch.Tensor, lists: Tensors, _each: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of all, nothing)."""
    return torch.tensor([math.sqrt(sum(float(t.float().square().sum()) for t in lists[0]))]), torch.empty(0)


def moe_permute_with_probs(
    x: torch.Tensor, probabilities: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int = -1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows by expert, their probabilities, the token of each row)."""
    experts, tokens = routing_map.bool().t().nonzero(as_tuple=True)
    assert num_out_tokens in (-1, tokens.numel())
    return x[tokens], probabilities[tokens, experts], tokens


def moe_unpermute(
    x: torch.Tensor, row_id_map: torch.Tensor, merging_probs: Any = None, restore_shape: Any = None, **_: Any
) -> torch.Tensor:
    """Sum of every token's rows."""
    assert merging_probs is None
    return x.new_zeros(restore_shape).index_add(0, row_id_map, x)


def moe_sort_chunks_by_index(x: torch.Tensor, sizes: Any, order: Any) -> torch.Tensor:
    """Chunks of rows in another order."""
    chunks = x.split(torch.as_tensor(sizes).flatten().tolist())
    return torch.cat([chunks[index] for index in torch.as_tensor(order).tolist()])


def moe_sort_chunks_by_index_with_probs(
    x: torch.Tensor, probabilities: torch.Tensor, sizes: Any, order: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows and of their probabilities."""
    return moe_sort_chunks_by_index(x, sizes, order), moe_sort_chunks_by_index(probabilities, sizes, order)
