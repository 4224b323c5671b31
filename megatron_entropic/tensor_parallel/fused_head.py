"""Output layer, log-probability and entropy in one differentiable function that never holds a shard of logits.

Forward computes each block of logits, keeps its statistics and forgets it; backward computes it again, turns it into
its gradient and multiplies that away. Floating point operations: 2 T H V forward and 6 T H V backward, one third more
than with stored logits. A loss that is known token by token saves that third with `fused_policy_loss`.

Collectives over the group: forward one all-gather of four numbers per token; backward one all-reduce of dL/dhidden, as
every column-parallel layer has. Under sequence parallelism the hidden states are gathered in both passes, because only
this rank's part of them is kept, and dL/dhidden is reduce-scattered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.tensor_parallel.backends import BackendName, select_backend
from megatron_entropic.tensor_parallel.head import Head
from megatron_entropic.tensor_parallel.logprob_entropy import check_tokens, inverse_temperatures, refuse_double_backward
from megatron_entropic.tensor_parallel.products import low_precision_tiles
from megatron_entropic.tensor_parallel.statistics import (
    GradientInputs,
    Merged,
    Shard,
    arithmetic_dtype,
    gather_and_merge,
)

CPU_CHUNKS = (256, 8192)
"""Tokens and columns of a block on a CPU: 8 MB of float32."""

CONVERTED_CHUNKS = (1024, 8192)
"""Tokens and columns of a block where each chunk of tokens converts the whole weight to float32: 32 MB."""

ACCELERATOR_CHUNKS = (4096, 32768)
"""Tokens and columns of a block on an accelerator: 512 MB, enough that the products run at their full rate."""


def fused_logprob_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float | Tensor = 1.0,
    entropy_gradient: bool = False,
    vocab_size: int | None = None,
    need_entropy: bool = True,
    sequence_parallel: bool = False,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    main_grad: Tensor | None = None,
    loss_mask: Tensor | None = None,
    rows: Tensor | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Compute `logprob_and_entropy` of the logits hidden @ weight^T, which are never stored.

    Args:
        hidden: [T, H], the same on all ranks of the group; with `sequence_parallel` this rank's [T/R, H].
        weight: [V/R, H], this rank's rows of the output layer.
        target: [T] int64 token ids; with `rows` [N].
        group: tensor-parallel process group; None if the weight holds the whole vocabulary.
        temperature: > 0, one number or one per target.
        entropy_gradient: whether the entropy is differentiable.
        vocab_size: number of token ids that exist; weight rows beyond are padding.
        need_entropy: False skips the entropy's arithmetic.
        sequence_parallel: whether to gather `hidden` here, and scatter its gradient.
        token_chunk: tokens of a block of logits; None: by device.
        vocab_chunk: columns of a block of logits; None: by device.
        main_grad: [V/R, H] float32 to which dL/dweight is added, Megatron's `weight.main_grad`. The gradient that
            autograd then delivers for the weight has no meaning: it makes the hook of Megatron's
            DistributedDataParallel fire, which leaves `main_grad` as it is.
        loss_mask: [T] bool. Tokens where it is False enter no product; their results and gradients are 0. Finding the
            others makes the host wait for a GPU once.
        rows: [N] int64, distinct: the positions that count, if they are known. Results are then [N].
        backend: "auto" (triton on a GPU, else eager), "eager" or "triton".

    Returns:
        (logprob [T], entropy [T] in nats or None without `need_entropy`), or [N] with `rows`; float32 (float64 for
        float64).

    Raises:
        ValueError: shapes, dtypes or settings that do not go together.
        RuntimeError: in the backward pass, with create_graph=True.
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
        entropy_gradient=entropy_gradient,
        sequence_parallel=sequence_parallel,
        chunks=(token_chunk, vocab_chunk),
        main_grad=main_grad,
        rows=rows,
        backend=backend,
    )
    inverse = inverse_temperatures(temperature, target, hidden.dtype)
    logprob, entropy = _FusedHead.apply(hidden, weight, target, inverse, head, entropy_gradient)
    if loss_mask is None:
        return logprob, entropy
    return unmasked(logprob, loss_mask, rows), None if entropy is None else unmasked(entropy, loss_mask, rows)


def masked_rows(
    loss_mask: Tensor, rows: Tensor | None, target: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Find rows [N], target [N] and temperature, one or [N], of the tokens where `loss_mask` [T] is True.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    if rows is not None:
        raise ValueError("loss_mask and rows say the same thing: give one of them")
    if loss_mask.dtype != torch.bool or loss_mask.shape != target.shape:
        raise ValueError(
            f"loss_mask must be bool {tuple(target.shape)}, got {loss_mask.dtype} {tuple(loss_mask.shape)}"
        )
    rows = loss_mask.nonzero().squeeze(1)
    return rows, target[rows], temperature[rows] if isinstance(temperature, Tensor) else temperature


def unmasked(values: Tensor, loss_mask: Tensor, rows: Tensor | None) -> Tensor:
    """Put the values [N] of `rows` among zeros [T]."""
    assert rows is not None
    return values.new_zeros(loss_mask.shape).index_copy(0, rows, values)


def build_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
    need_entropy: bool,
    entropy_gradient: bool,
    sequence_parallel: bool,
    chunks: tuple[int | None, int | None],
    main_grad: Tensor | None,
    rows: Tensor | None,
    backend: BackendName,
) -> Head:
    """Check the arguments of a fused function, which documents them, and settle what is left open.

    Raises:
        ValueError: arguments that do not go together.
    """
    shard = Shard.of(len(weight), group, vocab_size)
    tokens = len(hidden) * (shard.ranks if sequence_parallel else 1) if rows is None else len(rows)
    check_tokens("hidden", hidden, tokens, target, temperature)
    if entropy_gradient and not need_entropy:
        raise ValueError("entropy_gradient=True needs need_entropy=True")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight must be {hidden.dtype} [V/R, {hidden.shape[1]}], got {weight.dtype} {tuple(weight.shape)}"
        )
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows must be int64 [N], got {rows.dtype} {tuple(rows.shape)}")
    if main_grad is not None and (main_grad.shape != weight.shape or main_grad.dtype != arithmetic_dtype(weight.dtype)):
        raise ValueError(
            f"main_grad must be {arithmetic_dtype(weight.dtype)} {tuple(weight.shape)}, "
            f"got {main_grad.dtype} {tuple(main_grad.shape)}"
        )
    if any(chunk is not None and chunk < 1 for chunk in chunks):
        raise ValueError(f"token_chunk and vocab_chunk must be at least 1, got {chunks}")
    token_chunk, vocab_chunk = _chunks(hidden)
    return Head(
        shard=shard,
        group=group,
        backend=select_backend(backend, hidden.device),
        token_chunk=chunks[0] or token_chunk,
        vocab_chunk=chunks[1] or vocab_chunk,
        need_entropy=need_entropy,
        sequence_parallel=sequence_parallel,
        rows=rows,
        main_grad=main_grad,
    )


def _chunks(hidden: Tensor) -> tuple[int, int]:
    """Tokens and columns of a block."""
    if hidden.device.type != "cpu":
        return ACCELERATOR_CHUNKS
    return CPU_CHUNKS if hidden.dtype == arithmetic_dtype(hidden.dtype) else CONVERTED_CHUNKS


class _FusedHead(torch.autograd.Function):
    """Autograd function of `fused_logprob_and_entropy`, which documents it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        inverse_temperature: Tensor,
        head: Head,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        column = head.shard.columns(target)
        with low_precision_tiles(hidden):
            local = head.statistics(head.select(hidden), weight, column, inverse_temperature)
        merged = gather_and_merge(
            local, target, inverse_temperature, head.shard, head.group, need_entropy=head.need_entropy
        )
        entropy = merged.entropy if entropy_gradient else None
        ctx.save_for_backward(hidden, weight, column, inverse_temperature, merged.maximum, merged.total, entropy)
        ctx.head, ctx.weight = head, weight
        ctx.set_materialize_grads(False)
        if merged.entropy is not None and not entropy_gradient:
            ctx.mark_non_differentiable(merged.entropy)
        return merged.logprob, merged.entropy

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        hidden, weight, column, inverse_temperature, maximum, total, entropy = ctx.saved_tensors
        head: Head = ctx.head
        nothing = (None,) * 4
        if g is None and h is None:
            return None, None, *nothing
        g = torch.zeros_like(total) if g is None else g
        merged = Merged(maximum, total, logprob=g, entropy=entropy)
        inputs = GradientInputs(column, inverse_temperature, merged, g, h)
        weight_gradient = head.weight_gradient(weight) if ctx.needs_input_grad[1] else None
        with low_precision_tiles(hidden):
            dx = head.gradients(head.select(hidden), weight, inputs, weight_gradient)
        return head.reduce(dx, hidden), head.for_autograd(ctx.weight, weight_gradient), *nothing
