"""Checksums of the weights inside a vLLM worker: mixed into vLLM's worker class, called through collective_rpc.

vLLM fuses projections, shards them over its workers and, on a CPU, replaces their weights by packed copies that only
its kernels can read. Such a weight is read by multiplying the identity with it, which is exact: every sum has one term
that is not zero. What is compared is thus what the engine computes with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from megatron_entropic.weight_sync.checksums import Piece, checksum

_IDENTITY_ROWS = 256


@dataclass(frozen=True)
class _Rows:
    """Rows of a fused weight that belong to one Hugging Face tensor."""

    projection: str
    first: int
    """First row in the worker's weight."""
    count: int
    row: int
    """First row in the whole Hugging Face tensor."""


class WeightInspection:
    """Methods that every worker of a rollout engine gets."""

    def weight_pieces(self) -> list[Piece]:
        """Checksums of the piece of every Hugging Face tensor that this worker holds.

        Raises:
            NotImplementedError: a module with weights of a kind that this file does not know.
        """
        model = self.get_model()  # type: ignore[attr-defined]
        pieces: list[Piece] = []
        for name, module in model.named_modules():
            if isinstance(module, LinearBase):
                pieces += _linear(name, module, model.packed_modules_mapping)
            elif isinstance(module, VocabParallelEmbedding):
                pieces += _embedding(name, module, model)
            elif isinstance(module, RoutedExperts):
                pieces += expert_pieces(module)
            elif isinstance(module, MLAAttention):
                pieces.append(_latent_attention(name, module))
            elif own := dict(module.named_parameters(recurse=False)):
                if set(own) != {"weight"} or own["weight"].dim() != 1:
                    raise NotImplementedError(f"cluster.check_weights: {name} ({type(module).__name__}) is not known")
                pieces.append(Piece(f"{name}.weight", 0, 0, checksum(own["weight"])))
        return pieces


def _linear(name: str, module: Any, packed: dict[str, list[str]]) -> Iterator[Piece]:
    parent, _, own_name = name.rpartition(".")
    column, columns = 0, None
    if isinstance(module, RowParallelLinear):
        column, columns = module.tp_rank * module.input_size_per_partition, module.input_size
    for rows in _rows(module, packed.get(own_name, [own_name])):
        hf_name = f"{parent}.{rows.projection}"
        part = slice(rows.first, rows.first + rows.count)
        value = _checksum_of_weight(module, part, row=rows.row, column=column, columns=columns)
        yield Piece(f"{hf_name}.weight", rows.row, column, value)
        if getattr(module, "e_score_correction_bias", None) is not None:
            yield Piece(f"{name}.e_score_correction_bias", 0, 0, checksum(module.e_score_correction_bias))
        if module.bias is not None:
            # Some kernels keep it in float32: the values are those that were loaded.
            bias = module.bias[part].to(module.params_dtype)
            yield Piece(f"{hf_name}.bias", rows.row, 0, checksum(bias, row=rows.row))


def _rows(module: Any, projections: list[str]) -> list[_Rows]:
    """Rows of each projection in a linear layer's output."""
    if isinstance(module, QKVParallelLinear):
        query, key_value = module.num_heads * module.head_size, module.num_kv_heads * module.head_size
        group = module.tp_rank // module.num_kv_head_replicas
        sizes = [(query, module.tp_rank * query), (key_value, group * key_value), (key_value, group * key_value)]
    elif isinstance(module, MergedColumnParallelLinear):
        sizes = [(size, module.tp_rank * size) for size in module.output_partition_sizes]
    elif isinstance(module, ColumnParallelLinear):
        size = module.output_size_per_partition
        sizes = [(size, module.tp_rank * size)]
    else:
        sizes = [(module.output_size, 0)]
    found, first = [], 0
    for projection, (count, row) in zip(projections, sizes, strict=True):
        found.append(_Rows(projection, first, count, row))
        first += count
    return found


def _latent_attention(name: str, module: Any) -> Piece:
    """Checksum of kv_b_proj as decoding multiplies with it: a copy of the rows of keys, and one of those of values.

    Raises:
        NotImplementedError: a kernel packs them (AMX).
    """
    own = dict(module.named_parameters(recurse=False))
    if set(own) != {"W_UK_T", "W_UV"}:
        raise NotImplementedError(f"cluster.check_weights: {name} (MLAAttention with {sorted(own)}) is not known")
    # [heads, keys, latent] and [heads, latent, values] -> [heads * (keys + values), latent]
    rows = torch.cat((own["W_UK_T"], own["W_UV"].transpose(1, 2)), dim=1).flatten(0, 1)
    row = module.kv_b_proj.tp_rank * rows.shape[0]
    attention = name.removesuffix(".mla_attn.mla_attn")
    return Piece(f"{attention}.kv_b_proj.weight", row, 0, checksum(rows, row=row))


def _embedding(name: str, module: Any, model: Any) -> Iterator[Piece]:
    indices = module.shard_indices
    row, count = indices.org_vocab_start_index, indices.org_vocab_end_index - indices.org_vocab_start_index
    embedding = model.get_submodule("model.embed_tokens")
    head = getattr(model, "lm_head", None)
    tied = head is embedding or getattr(head, "weight", None) is embedding.weight
    hf_name = "model.embed_tokens.weight" if tied else f"{name}.weight"
    if not isinstance(module, ParallelLMHead):
        yield Piece(hf_name, row, 0, checksum(module.weight[:count], row=row))
    if module is head or isinstance(module, ParallelLMHead):
        # A tied head may multiply with a packed copy of its own, which must be the same.
        yield Piece(hf_name, row, 0, _checksum_of_weight(module, slice(0, count), row=row, column=0, columns=None))


def _checksum_of_weight(module: Any, rows: slice, *, row: int, column: int, columns: int | None) -> int:
    """Checksum of some rows of a layer's weight [outputs, inputs], which begin at (row, column) of the whole tensor."""
    if module.weight.numel():
        inputs = module.weight.shape[1]
    else:
        inputs = getattr(module, "input_size_per_partition", module.input_size)
    if not hasattr(module, "cpu_linear"):
        return checksum(module.weight[rows], row=row, column=column, columns=columns)
    width, total = inputs if columns is None else columns, 0
    dtype = module.weight.dtype
    for first in range(0, inputs, _IDENTITY_ROWS):
        count = min(_IDENTITY_ROWS, inputs - first)
        identity = torch.zeros(count, inputs, dtype=dtype)
        identity[torch.arange(count), first + torch.arange(count)] = 1
        values = module.quant_method.apply(module, identity, None)[:, rows].t()
        total += checksum(values, row=row, column=column + first, columns=width)
    return (total + 2**63) % 2**64 - 2**63


# Looks at the experts inside a vLLM worker: which Hugging Face tensors its fused weights w13 and w2 hold.
#
#   | w13 [experts, 2 * width, hidden]    gate and up projection, one behind the other
#   | w2  [experts, hidden, width]        down projection
#
# Tensor parallelism cuts the width. On a CPU the width is padded with zeros and each expert's matrix is packed: its
# elements stand in another order. Packing a matrix of the numbers 0, 1, 2, ... tells the order.


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
    """Function of a fused weight that tells where each element of an expert's matrix comes from, or None."""
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
    """Order of the elements of a packed matrix of `weight` [experts, rows, columns]: [rows * columns] int64.

    Element i of the packed matrix was number order[i].
    """
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
