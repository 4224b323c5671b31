"""The output layer and the statistics of its logits, block by block, as the two fused functions share them.

    hidden [T/R, H] --gather, select rows--> x [N, H]      N tokens that count, in chunks of c
    x chunk [c, H] @ weight chunk [n, H]^T -> logits block [c, n] -> statistics, or gradient

Only such blocks of logits ever exist. The vocabulary's padding enters no product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.tensor_parallel.backends import Backend
from megatron_entropic.tensor_parallel.products import chunk_operands, multiply, multiply_add, operand
from megatron_entropic.tensor_parallel.statistics import (
    GradientInputs,
    Shard,
    arithmetic_dtype,
    combine,
    empty_statistics,
)


@dataclass(frozen=True, slots=True)
class Head:
    """Output layer with the settings of one call, the same in all of its passes."""

    shard: Shard
    group: dist.ProcessGroup | None
    """Group of the ranks that share the vocabulary; None: this rank holds it all."""
    backend: Backend
    token_chunk: int
    """Number of rows of a block, c."""
    vocab_chunk: int
    """Number of columns of a block, n."""
    need_entropy: bool
    sequence_parallel: bool
    """Whether each rank holds its own part of the tokens, [T/R, H]; else all ranks hold all of them."""
    rows: Tensor | None
    """Indices of those of the T tokens that count, [N] int64; None: all count."""
    main_grad: Tensor | None
    """Megatron's buffer of the weight's gradient, [V/R, H], in which dL/dweight accumulates; None: autograd gets it."""

    def select(self, hidden: Tensor) -> Tensor:
        """Select the tokens that count, x [N, H], gathered over the group under sequence parallelism."""
        if self.sequence_parallel and self.shard.ranks > 1:
            everyone = hidden.new_empty(self.shard.ranks * len(hidden), hidden.shape[1])
            dist.all_gather_into_tensor(everyone, hidden.contiguous(), group=self.group)
            hidden = everyone
        return hidden if self.rows is None else hidden.index_select(0, self.rows)

    def reduce(self, dx: Tensor, hidden: Tensor) -> Tensor:
        """Gradient of `hidden` from each rank's part of the gradient dx [N, H] of what `select` gave; dx is used up."""
        scatters = self.sequence_parallel and self.shard.ranks > 1
        if not scatters and self.shard.ranks > 1:
            dist.all_reduce(dx, group=self.group)
        if self.rows is not None:
            tokens = len(hidden) * (self.shard.ranks if scatters else 1)
            dx = dx.new_zeros(tokens, dx.shape[1]).index_copy_(0, self.rows, dx)
        if not scatters:
            return dx
        own = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        dist.reduce_scatter_tensor(own, dx, group=self.group)
        return own

    def token_chunks(self, tokens: int) -> Iterator[slice]:
        """Yields slices of at most `token_chunk` tokens each, `tokens` in all."""
        yield from _slices(tokens, self.token_chunk)

    def vocab_chunks(self) -> Iterator[slice]:
        """Yields slices of at most `vocab_chunk` of this rank's columns that exist."""
        yield from _slices(self.shard.valid, self.vocab_chunk)

    def weight_chunks(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields columns and the weight's rows [n, H] for them as they enter a product, each used up before another."""
        return chunk_operands(weight, self.vocab_chunks())

    def statistics(self, x: Tensor, weight: Tensor, column: Tensor, inverse_temperature: Tensor) -> Tensor:
        """Compute statistics of this rank's vocabulary, [k + 1, N] (`statistics.empty_statistics`), for x [N, H]."""
        out = empty_statistics(1, len(x), x.dtype, x.device, need_entropy=self.need_entropy)
        out[0], out[1:] = -torch.inf, 0.0
        block = self._block(x)
        parts = out.new_empty(len(list(self.vocab_chunks())), len(out), self.token_chunk)
        for tokens in self.token_chunks(len(x)):
            some, inverse = operand(x[tokens]), inverse_temperature[tokens]
            chunk_parts = parts[..., : len(some)]
            for part, (columns, rows) in zip(chunk_parts, self.weight_chunks(weight), strict=True):
                logits = _cut(block, some, columns)
                multiply(some, rows.t(), out=logits)
                own = _within(column[tokens], columns)
                self.backend.statistics(logits, own, inverse, valid=logits.shape[1], pieces=1, out=part)
            if self.shard.valid:
                out[:-1, tokens] = combine(chunk_parts[:, :-1], inverse)
                out[-1, tokens] = chunk_parts[:, -1].sum(0)
        return out

    def gradients(self, x: Tensor, weight: Tensor, inputs: GradientInputs, weight_gradient: Tensor | None) -> Tensor:
        """Compute this rank's part of dL/dx [N, H]; the logits are computed once more.

        Args:
            x: [N, H].
            weight: [V/R, H].
            inputs: of the N tokens, with columns of this shard.
            weight_gradient: [V/R, H] in the dtype of the arithmetic, to which dL/dweight is added; None: not wanted.
        """
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        block = self._block(x)
        low = torch.empty_like(block, dtype=operand(x[:0]).dtype) if operand(x[:0]).dtype != block.dtype else block
        total = block.new_empty(self.token_chunk, x.shape[1])
        for tokens in self.token_chunks(len(x)):
            some, summed = operand(x[tokens]), total[: tokens.stop - tokens.start].zero_()
            of_chunk = inputs.of(tokens)
            for columns, part in self.weight_chunks(weight):
                logits, d = _cut(block, some, columns), _cut(low, some, columns)
                multiply(some, part.t(), out=logits)
                of_block = replace(of_chunk, column=_within(of_chunk.column, columns))
                self.backend.gradient(logits, of_block, valid=logits.shape[1], out=d)
                multiply_add(d, part, out=summed)
                if weight_gradient is not None:
                    multiply_add(d.t(), some, out=weight_gradient[columns])
            dx[tokens] = summed
        return dx

    def weight_gradient(self, weight: Tensor) -> Tensor:
        """Buffer in which dL/dweight accumulates: Megatron's, or zeros [V/R, H] in the dtype of the arithmetic."""
        if self.main_grad is not None:
            return self.main_grad
        return torch.zeros_like(weight, dtype=arithmetic_dtype(weight.dtype))

    def for_autograd(self, weight: Tensor, accumulated: Tensor | None) -> Tensor | None:
        """Gradient that the backward pass returns for the weight, of what `weight_gradient` accumulated; None of none.

        With `main_grad` the gradient is in Megatron's buffer already. Autograd must still deliver a tensor, because the
        hook of Megatron's DistributedDataParallel, which starts the reduction of that buffer, fires on delivery; it
        ignores the values if `grad_added_to_main_grad` is set. Where the weight is also the embedding's,
        `zero_out_wgrad` is set too: then autograd adds the embedding's gradient to this tensor and the hook adds the
        sum to the buffer.
        """
        if accumulated is None:
            return None
        if self.main_grad is None:
            return accumulated.to(weight.dtype)
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)

    def _block(self, x: Tensor) -> Tensor:
        """Room for one block of logits, uninitialised."""
        rows, columns = min(self.token_chunk, len(x)), min(self.vocab_chunk, self.shard.valid)
        return torch.empty(rows, columns, dtype=arithmetic_dtype(x.dtype), device=x.device)


def _slices(length: int, size: int) -> Iterator[slice]:
    for begin in range(0, length, size):
        yield slice(begin, min(begin + size, length))


def _cut(block: Tensor, tokens: Tensor, columns: slice) -> Tensor:
    return block[: len(tokens), : columns.stop - columns.start]


def _within(column: Tensor, columns: slice) -> Tensor:
    """Columns of the shard as columns of a block, -1 outside of it."""
    return torch.where((column >= columns.start) & (column < columns.stop), column - columns.start, -1)
