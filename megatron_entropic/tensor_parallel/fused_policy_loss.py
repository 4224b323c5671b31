"""Output layer and token-level loss in one function that takes the gradient while it still has the logits.

A policy loss that is a sum over tokens knows dL/dlogprob and dL/dentropy of a chunk of tokens as soon as the chunk's
statistics are merged. So each block of logits [c, V/R] becomes its gradient at once and is multiplied into dL/dhidden
and dL/dweight: 6 T H V floating point operations, as with stored logits, and never more than one block.

This needs everything that scales the loss to be known before: the coefficient of the EntroPIC term, the global
normalisers, and the factor by which the trainer multiplies the loss (`gradient_scale`). The backward pass checks that.

Collectives over the group: one all-gather of four numbers per token for each chunk, and the all-reduce (reduce-scatter
under sequence parallelism) of dL/dhidden, all in the forward pass; backward none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.tensor_parallel.backends import BackendName
from megatron_entropic.tensor_parallel.fused_head import build_head, masked_rows, unmasked
from megatron_entropic.tensor_parallel.head import Head
from megatron_entropic.tensor_parallel.logprob_entropy import inverse_temperatures, refuse_double_backward
from megatron_entropic.tensor_parallel.products import low_precision_tiles, multiply, multiply_add, operand
from megatron_entropic.tensor_parallel.statistics import (
    GradientInputs,
    Merged,
    arithmetic_dtype,
    empty_statistics,
    gather_and_merge,
)

TokenLoss = Callable[[Tensor, Tensor | None, slice], Tensor]
"""Function (logprob [c], entropy [c] or None, slice of tokens that they are) -> their share of the loss, a scalar.

It is called once for each chunk and differentiated; the loss is the sum over chunks. Every rank of the group must
compute the same.
"""

CPU_BLOCK_BYTES = 16 << 20
CPU_TOKENS = (128, 1024)
"""Least and most tokens of a block on a CPU.

It has 16 MB, but no fewer tokens than make the product with the weight's gradient worthwhile.
"""

CONVERTED_BLOCK_BYTES = 96 << 20
CONVERTED_TOKENS = (256, 1024)
"""Least and most tokens of a block where each chunk converts the whole weight twice: it is to have more of them."""

ACCELERATOR_BLOCK_BYTES = 1 << 30
ACCELERATOR_TOKENS = (1024, 8192)
"""Least and most tokens of a block on an accelerator.

It has 1 GB: each chunk reads and writes the weight's gradient once.
"""


def fused_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_loss: TokenLoss,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    need_entropy: bool = True,
    sequence_parallel: bool = False,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    main_grad: Tensor | None = None,
    gradient_scale: float = 1.0,
    loss_mask: Tensor | None = None,
    rows: Tensor | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the loss sum_t l(logprob_t, entropy_t) of a policy whose logits are hidden @ weight^T, and its inputs.

    Without gradients (torch.no_grad, or nothing that needs one) only the values are computed.

    Args:
        hidden: as in `fused_logprob_and_entropy`, like all that is not described here.
        weight: [V/R, H].
        target: [T] int64; with `rows` [N].
        token_loss: the loss of some tokens, see `TokenLoss`. The slice counts in `rows` or, with `loss_mask`, in the
            tokens where it is True.
        group: tensor-parallel process group.
        temperature: > 0, one number or one per target.
        vocab_size: number of token ids that exist.
        need_entropy: False passes None to `token_loss` in its place.
        sequence_parallel: whether to gather `hidden` here, and scatter its gradient.
        token_chunk: tokens of a block; None: by device and width of the vocabulary.
        vocab_chunk: columns of a product; the block has all columns. None: by device.
        main_grad: [V/R, H] float32 to which dL/dweight is added, already in the forward pass.
        gradient_scale: factor by which the trainer multiplies the loss: the gradient that reaches this function's loss
            in the backward pass. With `main_grad` it must be told in advance.
        loss_mask: [T] bool.
        rows: [N] int64.
        backend: implementation of the passes over logits.

    Returns:
        (loss, a scalar to be differentiated; logprob [T] or [N]; entropy likewise or None). The last two carry no
        gradient.

    Raises:
        ValueError: shapes, dtypes or settings that do not go together.
        RuntimeError: in the backward pass, with create_graph=True, when it runs a second time, or with `main_grad` if
            another gradient arrives than `gradient_scale` said.
    """
    if loss_mask is not None:
        rows, target, temperature = masked_rows(loss_mask, rows, target, temperature)
    head = build_head(
        hidden,
        weight,
        target,
        temperature,
        group=group,
        vocab_size=vocab_size,
        need_entropy=need_entropy,
        entropy_gradient=False,
        sequence_parallel=sequence_parallel,
        chunks=(token_chunk or _token_chunk(weight), vocab_chunk),
        main_grad=main_grad,
        rows=rows,
        backend=backend,
    )
    inverse = inverse_temperatures(temperature, target, hidden.dtype)
    wanted = (
        torch.is_grad_enabled() and hidden.requires_grad,
        torch.is_grad_enabled() and weight.requires_grad,
    )
    loss, logprob, entropy = _FusedPolicyLoss.apply(
        hidden, weight, target, inverse, head, token_loss, gradient_scale, wanted
    )
    if loss_mask is None:
        return loss, logprob, entropy
    return loss, unmasked(logprob, loss_mask, rows), None if entropy is None else unmasked(entropy, loss_mask, rows)


def _token_chunk(weight: Tensor) -> int:
    if weight.device.type != "cpu":
        limit, (least, most) = ACCELERATOR_BLOCK_BYTES, ACCELERATOR_TOKENS
    elif weight.dtype == arithmetic_dtype(weight.dtype):
        limit, (least, most) = CPU_BLOCK_BYTES, CPU_TOKENS
    else:
        limit, (least, most) = CONVERTED_BLOCK_BYTES, CONVERTED_TOKENS
    return min(max(limit // (4 * max(len(weight), 1)), least), most)


class _ChunkedLoss:
    """One pass over all chunks: forward to the loss, and at once back to the inputs where wanted."""

    def __init__(
        self,
        head: Head,
        weight: Tensor,
        target: Tensor,
        inverse_temperature: Tensor,
        token_loss: TokenLoss,
        gradient_scale: float,
    ) -> None:
        self._head = head
        self._weight = weight
        self._target = target
        self._column = head.shard.columns(target)
        self._inverse_temperature = inverse_temperature
        self._token_loss = token_loss
        self._gradient_scale = gradient_scale

    def run(self, x: Tensor, dx: Tensor | None, weight_gradient: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute loss, logprob [N] and entropy [N] or None; fill dx [N, H], and add to weight_gradient [V/R, H]."""
        head, dtype = self._head, self._inverse_temperature.dtype
        rows = min(head.token_chunk, len(x))
        block = torch.empty(rows, head.shard.valid, dtype=dtype, device=x.device)
        low = operand(x[:0]).dtype
        gradient = block if low == dtype else torch.empty_like(block, dtype=low)
        loss = torch.zeros((), dtype=dtype, device=x.device)
        logprob = torch.empty(len(x), dtype=dtype, device=x.device)
        entropy = torch.empty_like(logprob) if head.need_entropy else None
        differentiate = dx is not None or weight_gradient is not None
        for tokens in head.token_chunks(len(x)):
            some = operand(x[tokens])
            logits, d = block[: len(some)], gradient[: len(some)]
            merged = self._statistics(some, tokens, logits)
            share, g, h = self._share(merged, tokens, differentiate)
            loss += share
            logprob[tokens] = merged.logprob
            if entropy is not None:
                assert merged.entropy is not None
                entropy[tokens] = merged.entropy
            if differentiate:
                inputs = GradientInputs(self._column[tokens], self._inverse_temperature[tokens], merged, g, h)
                head.backend.gradient(logits, inputs, valid=logits.shape[1], out=d)
                self._multiply_back(some, tokens, d, dx, weight_gradient)
        return loss, logprob, entropy

    def _statistics(self, some: Tensor, tokens: slice, logits: Tensor) -> Merged:
        """Fill the logits [c, valid] of the chunk some [c, H]; returns their statistics merged over the ranks."""
        head, inverse = self._head, self._inverse_temperature[tokens]
        local = empty_statistics(1, len(some), logits.dtype, logits.device, need_entropy=head.need_entropy)
        for columns, rows in head.weight_chunks(self._weight):
            multiply(some, rows.t(), out=logits[:, columns])
        if head.shard.valid:
            column = self._column[tokens]
            head.backend.statistics(logits, column, inverse, valid=logits.shape[1], pieces=1, out=local)
        else:
            local[0], local[1:] = -torch.inf, 0.0
        return gather_and_merge(
            local, self._target[tokens], inverse, head.shard, head.group, need_entropy=head.need_entropy
        )

    def _share(self, merged: Merged, tokens: slice, differentiate: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the chunk's loss, its gradient g [c] with respect to log-probs, and h [c] to entropies or None."""
        if not differentiate:
            return self._token_loss(merged.logprob, merged.entropy, tokens), merged.logprob, None
        leaves = [v.detach().requires_grad_() for v in (merged.logprob, merged.entropy) if v is not None]
        with torch.enable_grad():
            share = self._token_loss(leaves[0], leaves[1] if len(leaves) == 2 else None, tokens)
        if share.dim() != 0:
            raise ValueError(f"token_loss must return a scalar, got {tuple(share.shape)}")
        if not share.requires_grad:
            return share, torch.zeros_like(merged.logprob), None
        scale = torch.full_like(share, self._gradient_scale)
        gradients = torch.autograd.grad(share, leaves, scale, allow_unused=True)
        g = torch.zeros_like(merged.logprob) if gradients[0] is None else gradients[0]
        return share.detach(), g, gradients[1] if len(gradients) == 2 else None

    def _multiply_back(
        self, some: Tensor, tokens: slice, d: Tensor, dx: Tensor | None, weight_gradient: Tensor | None
    ) -> None:
        """Compute dx = d @ weight and weight_gradient += d^T @ x for the chunk's gradient d [c, valid]."""
        summed = some.new_zeros(some.shape, dtype=self._inverse_temperature.dtype)
        for columns, rows in self._head.weight_chunks(self._weight):
            if dx is not None:
                multiply_add(d[:, columns], rows, out=summed)
            if weight_gradient is not None:
                multiply_add(d[:, columns].t(), some, out=weight_gradient[columns])
        if dx is not None:
            dx[tokens] = summed


class _FusedPolicyLoss(torch.autograd.Function):
    """Autograd function of `fused_policy_loss`, which documents it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        inverse_temperature: Tensor,
        head: Head,
        token_loss: TokenLoss,
        gradient_scale: float,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x = head.select(hidden)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
        weight_gradient = head.weight_gradient(weight) if wanted[1] else None
        passes = _ChunkedLoss(head, weight, target, inverse_temperature, token_loss, gradient_scale)
        with low_precision_tiles(x):
            loss, logprob, entropy = passes.run(x, dx, weight_gradient)
        dhidden = None if dx is None else head.reduce(dx, hidden)
        # Not save_for_backward: the backward pass scales them in place and hands them out.
        ctx.gradients = (dhidden, weight_gradient)
        ctx.weight, ctx.head, ctx.gradient_scale = weight, head, gradient_scale
        ctx.mark_non_differentiable(*(value for value in (logprob, entropy) if value is not None))
        ctx.set_materialize_grads(False)
        return loss, logprob, entropy

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        nothing = (None,) * 6
        if incoming is None:
            return None, None, *nothing
        if ctx.gradients is None:
            raise RuntimeError("fused_policy_loss: a second backward pass; the gradients were given away in the first")
        (dhidden, weight_gradient), ctx.gradients = ctx.gradients, None
        if ctx.head.main_grad is not None:
            _require_scale(incoming, ctx.gradient_scale)
        else:
            factor = incoming / ctx.gradient_scale
            for gradient in (dhidden, weight_gradient):
                if gradient is not None:
                    gradient.mul_(factor)
        return dhidden, ctx.head.for_autograd(ctx.weight, weight_gradient), *nothing


def _require_scale(incoming: Tensor, expected: float) -> None:
    """Refuse another scale than was announced."""
    # The weight's gradient is in Megatron's buffer already, with the announced one.
    message = (
        f"fused_policy_loss: the weight's gradient was taken for a loss multiplied by gradient_scale={expected}, "
        "and another factor arrived"
    )
    if incoming.is_cuda:
        torch._assert_async(incoming == expected, message)
    elif float(incoming) != expected:
        raise RuntimeError(f"{message}: {float(incoming)}")
