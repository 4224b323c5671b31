"""Looks at the experts inside a vLLM worker: which Hugging Face tensors its fused weights w13 and w2 hold.

    w13 [experts, 2 * width, hidden]    gate and up projection, one behind the other
    w2  [experts, hidden, width]        down projection

Tensor parallelism cuts the width. On a CPU the width is padded with zeros and each expert's matrix is packed: its
elements stand in another order. Packing a matrix of the numbers 0, 1, 2, ... tells the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from megatron_entropic.weight_sync.checksums import Piece, checksum


def expert_pieces(module: Any) -> Iterator[Piece]:
    """Checksums of all tensors of a layer's experts, as far as this worker (a RoutedExperts module) holds them.

    Raises:
        NotImplementedError: expert parallelism, quantised experts, or a kernel that keeps them in an unknown form.
    """
    config = module.moe_config
    prefix = module.layer_name.removesuffix(".routed_experts")
    if config.moe_parallel_config.use_ep:
        raise NotImplementedError(f"cluster.check_weights: {prefix}: expert parallelism in the engine is not known")
    order_of = _order_of(module.quant_method, prefix)
    width, padded = config.intermediate_size_per_partition_unpadded, module.w2_weight.shape[2]
    first = config.tp_rank * width
    down_columns = config.tp_size * width
    orders = [order_of(weight) for weight in (module.w13_weight, module.w2_weight)]
    for expert in range(module.w13_weight.shape[0]):
        w13 = _unpacked(module.w13_weight[expert], orders[0])
        w2 = _unpacked(module.w2_weight[expert], orders[1])
        name = f"{prefix}.{expert}"
        gate, up, down = w13[:width], w13[padded : padded + width], w2[:, :width]
        yield Piece(f"{name}.{module.ckpt_gate_proj_name}.weight", first, 0, checksum(gate, row=first))
        yield Piece(f"{name}.{module.ckpt_up_proj_name}.weight", first, 0, checksum(up, row=first))
        value = checksum(down, column=first, columns=down_columns)
        yield Piece(f"{name}.{module.ckpt_down_proj_name}.weight", 0, first, value)


def _order_of(method: Any, prefix: str) -> Any:
    """A function of a fused weight that tells where each element of an expert's matrix comes from, or None."""
    if isinstance(method, UnquantizedFusedMoEMethod):
        if method.unquantized_backend in (UnquantizedMoeBackend.TRITON, UnquantizedMoeBackend.BATCHED_TRITON):
            return lambda _weight: None
        if (
            method.unquantized_backend == UnquantizedMoeBackend.CPU
            and not method.moe_kernel.fused_experts._use_zentorch
        ):
            isa = method.moe_kernel.fused_experts.isa
            return lambda weight: _packed_order(weight, isa)
    raise NotImplementedError(f"cluster.check_weights: {prefix} ({type(method).__name__}): its weights are not known")


def _packed_order(weight: torch.Tensor, isa: str) -> torch.Tensor:
    """[rows * columns] int64: element i of a packed matrix of `weight` [experts, rows, columns] was number order[i]."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    shape = (1, *weight.shape[1:])
    numbers = torch.arange(weight.shape[1] * weight.shape[2])

    def packed(integers: torch.Tensor) -> torch.Tensor:
        moved = cpu_prepack_moe_weight(integers.view(weight.dtype).view(shape), isa)
        return moved.view(integers.dtype).flatten().to(torch.int64)

    if weight.element_size() == 4:
        return packed(numbers.to(torch.int32))
    # The bits of 15-bit halves as values of two bytes: packing only moves them.
    return packed((numbers & 0x7FFF).to(torch.int16)) + (packed((numbers >> 15).to(torch.int16)) << 15)


def _unpacked(matrix: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """An expert's matrix [rows, columns] with its elements in their places."""
    if order is None:
        return matrix
    flat = torch.empty_like(matrix).flatten()
    flat[order] = matrix.flatten()
    return flat.view(matrix.shape)
