"""What the operation on vocabulary shards is compared with: the usual implementation, and float64.

Shapes: T tokens, V columns of the whole vocabulary, R tensor-parallel ranks, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ROWS = 64
"""Tokens a time of the float64 reference, whose temporaries would otherwise be the largest of all."""


def textbook_logprob_and_entropy(
    logits: Tensor, target: Tensor, *, entropy_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """What RL trainers on Megatron-core usually run: its cross-entropy, and an entropy with three all-reduces.

    megatron-core's tensor-parallel group must exist. The cross-entropy overwrites float32 logits, hence the clone.

    Args:
        logits: [T, V/R].
        target: [T] int64.
        entropy_gradient: whether the entropy is differentiable; else it is computed without a graph.

    Returns:
        (logprob [T], entropy [T] in nats), float32.
    """
    from megatron.core.parallel_state import get_tensor_model_parallel_group
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    group = get_tensor_model_parallel_group()
    own = logits.clone() if logits.dtype == torch.float32 else logits
    logprob = -vocab_parallel_cross_entropy(own, target)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = _ThreeReduceEntropy.apply(logits, group)
    return logprob, entropy


class _ThreeReduceEntropy(torch.autograd.Function):
    """log sum exp z - sum p z, which needs the maximum, the sum of exponentials and the sum of p z from all ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = logits.float()
        maximum = x.amax(-1)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        p = (x - maximum[:, None]).exp_()
        total = p.sum(-1)
        dist.all_reduce(total, group=group)
        p.div_(total[:, None])
        mean = (p * x).sum(-1)
        dist.all_reduce(mean, group=group)
        ctx.save_for_backward(x, p, mean)
        return maximum + total.log() - mean

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, None]:
        x, p, mean = ctx.saved_tensors
        return (x - mean[:, None]).mul_(p).mul_(-h[:, None]), None


def full_softmax(logits: Tensor, target: Tensor, *, entropy_gradient: bool = True) -> tuple[Tensor, Tensor]:
    """torch.log_softmax over a vocabulary [T, V] that is not sharded: (logprob [T], entropy [T])."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    logprob = log_p.gather(1, target[:, None]).squeeze(1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(log_p.exp() * log_p).sum(-1)
    return logprob, entropy


def column_parallel_logits(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """hidden [T, H] @ weight [V/R, H]^T with the one all-reduce of dL/dhidden that every column-parallel layer has."""
    return _ColumnParallel.apply(hidden, weight, group)


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.group = group
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        dhidden = gradient @ weight
        if ctx.group is not None and dist.get_world_size(ctx.group) > 1:
            dist.all_reduce(dhidden, group=ctx.group)
        return dhidden, gradient.t() @ hidden, None


def row_chunks(tokens: int) -> Iterator[slice]:
    """Slices of CHUNK_ROWS tokens."""
    return (slice(begin, min(begin + CHUNK_ROWS, tokens)) for begin in range(0, tokens, CHUNK_ROWS))


class Float64Softmax:
    """Log-probability, entropy and logits' gradient in float64, some tokens a time."""

    def __init__(self, logits: Tensor, target: Tensor, group: dist.ProcessGroup | None) -> None:
        """
        Args:
            logits: [T, V/R] of any dtype, this rank's.
            target: [T].
            group: of the ranks that share the vocabulary; None: one.
        """
        self._logits, self._group = logits, group
        rank = 0 if group is None else dist.get_rank(group)
        self._column = target - rank * logits.shape[1]
        parts = [self._forward(rows) for rows in row_chunks(len(logits))]
        self.logprob, self.entropy, self._log_total = (torch.cat(values) for values in zip(*parts, strict=True))

    def gradient(self, rows: slice, g: Tensor, h: Tensor | None) -> Tensor:
        """dL/dlogits [c, V/R] of some tokens; g [T] and h [T] are dL/dlogprob and dL/dentropy."""
        log_p = self._logits[rows].double() - self._log_total[rows, None]
        factor = g[rows, None].double()
        if h is not None:
            factor = factor + h[rows, None].double() * (log_p + self.entropy[rows, None])
        gradient = -log_p.exp() * factor
        owned, column = self._own(rows)
        return gradient.scatter_add_(1, column, torch.where(owned, g[rows, None].double(), 0.0))

    def _own(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(whether this rank has the target [c, 1], its column or 0 [c, 1])."""
        column = self._column[rows, None]
        owned = (column >= 0) & (column < self._logits.shape[1])
        return owned, torch.where(owned, column, 0)

    def _forward(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(logprob, entropy, log sum exp) of some tokens."""
        x = self._logits[rows].double()
        maximum = self._reduced(x.amax(-1), dist.ReduceOp.MAX)
        d = x - maximum[:, None]
        e = d.exp()
        owned, column = self._own(rows)
        own = torch.where(owned, d.gather(1, column), 0.0).squeeze(1)
        sums = self._reduced(torch.stack([e.sum(-1), (d * e).sum(-1), own]), dist.ReduceOp.SUM)
        log_sum = sums[0].log()
        return sums[2] - log_sum, log_sum - sums[1] / sums[0], maximum + log_sum

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self._group is not None:
            dist.all_reduce(values, op=how, group=self._group)
        return values
