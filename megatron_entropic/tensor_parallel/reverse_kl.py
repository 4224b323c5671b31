"""Reverse KL divergence of a policy from a teacher over a sharded vocabulary, from hidden states of both.

    hidden x [N, H]          @ weight chunk^T         -> policy's logits block  [c, n] --+--> statistics, or gradient
    teacher_hidden y [N, H'] @ teacher weight chunk^T -> teacher's logits block [c, n] --+

Only such blocks of logits ever exist, of either model; each is computed again in the backward pass. With p the policy's
softmax and q the teacher's, x and y raw logits, d = (x - max x) / T, f = (y - max y) / T', a piece of the vocabulary is

    m = max x,   S = sum exp(d),   U = sum exp(d) (d - f),   m' = max y,   S' = sum exp(f)

and pieces, of a rank or of several, merge by log-sum-exp into those of the whole vocabulary, of which

    KL(p || q) = U / S - log S + log S'          dKL/dx_v = 1/T p_v (d_v - f_v - U / S)

Collectives over the group: one all-gather of five numbers per token forward; backward the all-reduce of dL/dhidden
(under sequence parallelism a reduce-scatter, and hidden states are gathered in both passes). Floating point operations:
2 N (H + H') V forward, 2 N (H + H') V + 4 N H V backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.tensor_parallel.fused_head import build_head
from megatron_entropic.tensor_parallel.head import Head
from megatron_entropic.tensor_parallel.logprob_entropy import inverse_temperatures, refuse_double_backward
from megatron_entropic.tensor_parallel.products import low_precision_tiles, multiply, multiply_add, operand
from megatron_entropic.tensor_parallel.statistics import MIN_EXPONENT, arithmetic_dtype

ACCELERATOR_CHUNKS = (1024, 32768)
"""Tokens and columns of a block on an accelerator: 128 MB, of which half a dozen live at a time."""


def fused_reverse_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    main_grad: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Compute KL(policy || teacher) of each token's next-token distributions, with gradient for the policy.

    The policy's logits are hidden @ weight^T, the teacher's teacher_hidden @ teacher_weight^T; neither are stored. The
    teacher is a constant.

    Args:
        hidden: [T, H] of the policy, the same on all ranks of the group; with `sequence_parallel` this rank's [T/R, H].
        weight: [V/R, H], this rank's rows of the policy's output layer.
        teacher_hidden: [T, H'] of the teacher, with `rows` [N, H']: of those tokens alone. All ranks hold all of it.
        teacher_weight: [V/R, H'], the same tokens' rows of the teacher's output layer.
        group: tensor-parallel process group; None if the weights hold the whole vocabulary.
        temperature: > 0, one number or one per token, by which the policy's logits are divided.
        teacher_temperature: the same for the teacher's logits; None: as the policy's.
        vocab_size: number of token ids that exist; weight rows beyond are padding.
        sequence_parallel: whether to gather `hidden` here, and scatter its gradient.
        token_chunk: tokens of a block of logits; None: by device.
        vocab_chunk: columns of a block of logits; None: by device.
        main_grad: as in `fused_logprob_and_entropy`.
        rows: [N] int64, distinct: the positions that count; None: all do.

    Returns:
        Divergences in nats, [T] or [N], float32 (float64 for float64). A token whose log-probability under either model
        is more than 200 nats below the likeliest's counts as if it were 200 below.

    Raises:
        ValueError: shapes, dtypes or settings that do not go together.
        RuntimeError: in the backward pass, with create_graph=True.
    """
    tokens = len(teacher_hidden)
    accelerated = hidden.device.type != "cpu"
    default = ACCELERATOR_CHUNKS if accelerated else (None, None)
    head = build_head(
        hidden,
        weight,
        torch.zeros(tokens, dtype=torch.int64, device=hidden.device),
        temperature,
        group=group,
        vocab_size=vocab_size,
        need_entropy=False,
        entropy_gradient=False,
        sequence_parallel=sequence_parallel,
        chunks=(token_chunk or default[0], vocab_chunk or default[1]),
        main_grad=main_grad,
        rows=rows,
        backend="eager",
    )
    if teacher_hidden.dim() != 2 or teacher_weight.shape != (len(weight), teacher_hidden.shape[1]):
        raise ValueError(
            f"teacher_weight must be [{len(weight)}, H'] for teacher_hidden [N, H'], got "
            f"{tuple(teacher_weight.shape)} for {tuple(teacher_hidden.shape)}"
        )
    if not teacher_hidden.dtype == teacher_weight.dtype == hidden.dtype:
        raise ValueError(f"the teacher must be {hidden.dtype}: {teacher_hidden.dtype}, {teacher_weight.dtype}")
    of_policy = inverse_temperatures(temperature, teacher_hidden[:, 0], hidden.dtype)
    of_teacher = of_policy
    if teacher_temperature is not None:
        of_teacher = inverse_temperatures(teacher_temperature, teacher_hidden[:, 0], hidden.dtype)
    inverse = torch.stack((of_policy, of_teacher))
    teacher = teacher_hidden.detach(), teacher_weight.detach()
    divergence: Tensor = _ReverseKl.apply(hidden, weight, *teacher, inverse, head)
    return divergence


class _Merged(NamedTuple):
    """Statistics of the whole vocabulary, each [N]."""

    maximum: Tensor
    """Maximum of the policy's raw logits."""
    total: Tensor
    """S of the policy."""
    mean: Tensor
    """U / S: the policy's mean of d - f."""
    teacher_maximum: Tensor
    divergence: Tensor


class _Block(NamedTuple):
    """Logits of some tokens and columns under both models."""

    columns: slice
    rows: Tensor
    """The policy's weight of these columns as an operand, [n, H]."""
    policy: Tensor
    """[c, n]."""
    teacher: Tensor
    """[c, n]."""


def _blocks(
    head: Head, layers: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], buffers: Tensor
) -> Iterator[_Block]:
    """Yields blocks of logits over this rank's columns, each overwritten by the next.

    Args:
        head: the output layer.
        layers: hidden states [c, H] as an operand, and weight [V/R, H]; of the policy and of the teacher.
        buffers: [2, c, vocab_chunk].
    """
    (x, weight), (y, teacher_weight) = layers
    chunks = zip(head.weight_chunks(weight), head.weight_chunks(teacher_weight), strict=True)
    for (columns, rows), (_, teacher_rows) in chunks:
        width = columns.stop - columns.start
        policy, teacher = (buffer[: len(x), :width] for buffer in buffers)
        multiply(x, rows.t(), out=policy)
        multiply(y, teacher_rows.t(), out=teacher)
        yield _Block(columns, rows, policy, teacher)


def _buffers(head: Head, x: Tensor) -> Tensor:
    shape = (2, min(head.token_chunk, len(x)), min(head.vocab_chunk, head.shard.valid))
    return torch.empty(shape, dtype=arithmetic_dtype(x.dtype), device=x.device)


def _scaled(logits: Tensor, maximum: Tensor, inverse: Tensor) -> Tensor:
    """(logits - maximum) / temperature in place, no less than MIN_EXPONENT."""
    return logits.sub_(maximum[:, None]).mul_(inverse[:, None]).clamp_(min=MIN_EXPONENT)


def _block_statistics(block: _Block, inverse: Tensor) -> Tensor:
    """Statistics m, S, U, m', S' of a block, [5, c]; its logits are used up."""
    maximum, teacher_maximum = block.policy.amax(-1), block.teacher.amax(-1)
    # A row that is masked as a whole has m = -inf; centred on 0, its exponents stay low and its sums are 0.
    d = _scaled(block.policy, maximum.masked_fill(maximum == -torch.inf, 0.0), inverse[0])
    f = _scaled(block.teacher, teacher_maximum.masked_fill(teacher_maximum == -torch.inf, 0.0), inverse[1])
    likelihood = d.exp()
    difference = d.sub_(f).mul_(likelihood)
    return torch.stack(
        (maximum, likelihood.sum(-1), difference.sum(-1), teacher_maximum, f.exp_().sum(-1)),
    )


def _combine(pieces: Tensor, inverse: Tensor) -> Tensor:
    """Statistics of the union of pieces, [P, 5, c] -> [5, c], added in the order of the pieces."""
    maximum, teacher_maximum = pieces[:, 0].amax(0), pieces[:, 3].amax(0)
    shift = _shift(pieces[:, 0], maximum, inverse[0])
    teacher_shift = _shift(pieces[:, 3], teacher_maximum, inverse[1])
    factor = shift.exp()
    return torch.stack(
        (
            maximum,
            (factor * pieces[:, 1]).sum(0),
            (factor * (pieces[:, 2] + (shift - teacher_shift) * pieces[:, 1])).sum(0),
            teacher_maximum,
            (teacher_shift.exp() * pieces[:, 4]).sum(0),
        )
    )


def _shift(maxima: Tensor, maximum: Tensor, inverse: Tensor) -> Tensor:
    delta = torch.where(maximum == -torch.inf, 0.0, maxima - maximum)
    return (delta * inverse).clamp_(min=MIN_EXPONENT)


def _local_statistics(
    head: Head, x: Tensor, weight: Tensor, y: Tensor, teacher_weight: Tensor, inverse: Tensor
) -> Tensor:
    """Statistics of this rank's columns, [5, N]."""
    out = inverse.new_zeros(5, len(x))
    out[0], out[3] = -torch.inf, -torch.inf
    buffers = _buffers(head, x)
    for tokens in head.token_chunks(len(x)):
        layers = (operand(x[tokens]), weight), (operand(y[tokens]), teacher_weight)
        parts = [_block_statistics(block, inverse[:, tokens]) for block in _blocks(head, layers, buffers)]
        if parts:  # there are none where all of this rank's columns are padding
            out[:, tokens] = _combine(torch.stack(parts), inverse[:, tokens])
    return out


def _gather_and_merge(local: Tensor, inverse: Tensor, head: Head) -> _Merged:
    """Statistics of the whole vocabulary from those [5, N] of each rank, the same on every rank bit for bit."""
    whole = local
    if head.shard.ranks > 1 and local.shape[1] > 0:
        gathered = local.new_empty(head.shard.ranks, *local.shape)
        dist.all_gather(list(gathered), local, group=head.group)
        whole = _combine(gathered, inverse)
    maximum, total, weighted, teacher_maximum, teacher_total = whole
    mean = weighted / total
    return _Merged(maximum, total, mean, teacher_maximum, mean - total.log() + teacher_total.log())


class _ReverseKl(torch.autograd.Function):
    """Autograd function of `fused_reverse_kl`, which documents it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        inverse: Tensor,
        head: Head,
    ) -> Tensor:
        x = head.select(hidden)
        with low_precision_tiles(hidden):
            local = _local_statistics(head, x, weight, teacher_hidden, teacher_weight, inverse)
        merged = _gather_and_merge(local, inverse, head)
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight, inverse, *merged[:4])
        ctx.head, ctx.weight = head, weight
        return merged.divergence

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        hidden, weight, teacher_hidden, teacher_weight, inverse, maximum, total, mean, teacher_maximum = (
            ctx.saved_tensors
        )
        head: Head = ctx.head
        weight_gradient = head.weight_gradient(weight) if ctx.needs_input_grad[1] else None
        layers = (head.select(hidden), weight), (teacher_hidden, teacher_weight)
        with low_precision_tiles(hidden):
            merged = _Merged(maximum, total, mean, teacher_maximum, divergence=incoming)
            dx = _gradients(head, layers, inverse, merged, weight_gradient)
        return head.reduce(dx, hidden), head.for_autograd(ctx.weight, weight_gradient), None, None, None, None


def _gradients(
    head: Head,
    layers: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    inverse: Tensor,
    merged: _Merged,
    weight_gradient: Tensor | None,
) -> Tensor:
    """Compute this rank's part of dL/dx [N, H], and add dL/dweight to `weight_gradient`.

    Args:
        head: the output layer.
        layers: hidden states [N, H] and weight [V/R, H] of the policy and of the teacher.
        inverse: inverse temperatures [2, N].
        merged: statistics of the whole vocabulary, with dL/dKL in the place of the divergence.
        weight_gradient: [V/R, H] in the dtype of the arithmetic; None: not wanted.
    """
    (x, weight), (y, teacher_weight) = layers
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    buffers = _buffers(head, x)
    scale = merged.divergence * inverse[0] / merged.total
    for tokens in head.token_chunks(len(x)):
        some, temperatures = operand(x[tokens]), inverse[:, tokens]
        summed = buffers.new_zeros(some.shape)
        for block in _blocks(head, ((some, weight), (operand(y[tokens]), teacher_weight)), buffers):
            d = _scaled(block.policy, merged.maximum[tokens], temperatures[0])
            f = _scaled(block.teacher, merged.teacher_maximum[tokens], temperatures[1])
            likelihood = d.exp()
            gradient = d.sub_(f).sub_(merged.mean[tokens, None]).mul_(likelihood).mul_(scale[tokens, None])
            gradient = gradient.to(some.dtype)
            multiply_add(gradient, block.rows, out=summed)
            if weight_gradient is not None:
                multiply_add(gradient.t(), some, out=weight_gradient[block.columns])
        dx[tokens] = summed
    return dx
