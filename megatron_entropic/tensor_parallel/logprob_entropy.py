"""Log-probability and entropy of tokens from logits whose vocabulary is sharded over tensor-parallel ranks.

Forward: one read of the logits shard, one all-gather of four numbers per token. Backward: one read and one write, no
collective; the gradient replaces the logits in their own buffer. No rank ever holds the full vocabulary, and beside the
logits nothing larger than [T] outlives the call.

    forward    see `statistics`
    backward   dx_v = 1/temperature * ( 1[v = target] g  -  p_v (g + h (log p_v + H)) )      g = dL/dlogp,  h = dL/dH
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.tensor_parallel.backends import Backend, BackendName, select_backend
from megatron_entropic.tensor_parallel.statistics import (
    INVARIANT_PIECES,
    GradientInputs,
    Merged,
    Shard,
    arithmetic_dtype,
    empty_statistics,
    gather_and_merge,
)


def logprob_and_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float | Tensor = 1.0,
    entropy_gradient: bool = False,
    vocab_size: int | None = None,
    in_place: bool = True,
    need_entropy: bool = True,
    layout_invariant: bool = False,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Compute log softmax(logits / temperature)[target] and the entropy of that softmax, token by token.

    With `group`, all its ranks call this together with the same `target` and `temperature`, and all get the same result
    bit for bit. The rank's columns are [rank * n, (rank + 1) * n) of the vocabulary, n = logits.shape[1].

    Args:
        logits: [T, V/R] float32, bfloat16 or float16; arithmetic and results are float32 (float64 for float64). T may
            be 0. -inf masks a column; a row that is masked as a whole gives NaN. The forward pass does not change them.
        target: [T] int64 token ids. One outside the vocabulary gives a log-probability of NaN.
        group: tensor-parallel process group; None if the logits hold the whole vocabulary (never the default group).
        temperature: > 0, one number or one per token, [T]. A constant: no gradient flows to it.
        entropy_gradient: whether the entropy is differentiable. The controller needs its value only.
        vocab_size: number of token ids that exist; columns beyond are padding and take no part. None: all R * n exist.
        in_place: the backward pass writes the gradient over the logits, and nothing of their size is allocated. They
            must have no other user after it: autograd notices one that saved them (an error, never a wrong gradient),
            and refuses a second backward pass. A leaf, or a view of one, belongs to the caller and is never written.
        need_entropy: False skips the entropy's arithmetic.
        layout_invariant: the same logits give the same bits for R = 1, 2, 4 and 8, because every rank sums eighths of
            the vocabulary; R * n must be divisible by 8. Costs up to 100 bytes per token and rank instead of 16.
        backend: "auto" (triton on a GPU, else eager), "eager" or "triton".

    Returns:
        (logprob [T], entropy [T] in nats, or None without `need_entropy`).

    Raises:
        ValueError: shapes, dtypes or settings that do not go together.
        RuntimeError: in the backward pass, with create_graph=True, or when it runs a second time in place.

    Formula and trade-offs: docstring of `statistics`.
    """
    check_tokens("logits", logits, len(logits), target, temperature)
    if entropy_gradient and not need_entropy:
        raise ValueError("entropy_gradient=True needs need_entropy=True")
    shard = Shard.of(logits.shape[1], group, vocab_size)
    inverse = inverse_temperatures(temperature, target, logits.dtype)
    owner = logits if logits._base is None else logits._base
    logprob, entropy = _LogprobEntropy.apply(
        logits,
        target,
        inverse,
        shard,
        group,
        select_backend(backend, logits.device),
        _pieces(shard) if layout_invariant else 1,
        entropy_gradient,
        need_entropy,
        in_place and not owner.is_leaf,
    )
    return logprob, entropy


def check_tokens(name: str, rows: Tensor, tokens: int, target: Tensor, temperature: float | Tensor) -> None:
    """Refuse arguments that would otherwise broadcast or be silently wrong.

    Args:
        name: name of the argument `rows`.
        rows: must be floating point with two dimensions.
        tokens: T.
        target: must be int64 [T].
        temperature: must be a number > 0, or [T].

    Raises:
        ValueError: an argument is not so.
    """
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"{name} must be floating point with two dimensions, got {rows.dtype} {tuple(rows.shape)}")
    if target.shape != (tokens,) or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{tokens}], got {target.dtype} {tuple(target.shape)}")
    if isinstance(temperature, Tensor):
        if temperature.shape != target.shape:
            raise ValueError(f"temperature must be a number or [{tokens}], got {tuple(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"temperature must be > 0, not {temperature}")


def inverse_temperatures(temperature: float | Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse temperature of each target, [T], in the dtype of the arithmetic on numbers of `dtype`."""
    dtype = arithmetic_dtype(dtype)
    if isinstance(temperature, Tensor):
        return temperature.detach().to(target.device, dtype).reciprocal()
    return torch.full(target.shape, 1.0 / temperature, dtype=dtype, device=target.device)


def _pieces(shard: Shard) -> int:
    """Number of the vocabulary's eighths on this rank."""
    if INVARIANT_PIECES % shard.ranks or shard.width * shard.ranks % INVARIANT_PIECES:
        raise ValueError(
            f"layout_invariant needs 1, 2, 4 or 8 ranks and a padded vocabulary divisible by {INVARIANT_PIECES}, "
            f"not {shard.ranks} ranks with {shard.width} columns each"
        )
    return INVARIANT_PIECES // shard.ranks


class _LogprobEntropy(torch.autograd.Function):
    """Autograd function of `logprob_and_entropy`, which documents it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        inverse_temperature: Tensor,
        shard: Shard,
        group: dist.ProcessGroup | None,
        backend: Backend,
        pieces: int,
        entropy_gradient: bool,
        need_entropy: bool,
        in_place: bool,
    ) -> tuple[Tensor, Tensor | None]:
        column = shard.columns(target)
        local = empty_statistics(pieces, len(logits), logits.dtype, logits.device, need_entropy=need_entropy)
        backend.statistics(logits, column, inverse_temperature, valid=shard.valid, pieces=pieces, out=local)
        merged = gather_and_merge(local, target, inverse_temperature, shard, group, need_entropy=need_entropy)
        entropy = merged.entropy if entropy_gradient else None
        ctx.save_for_backward(logits, column, inverse_temperature, merged.maximum, merged.total, entropy)
        ctx.shard, ctx.in_place, ctx.backend = shard, in_place, backend
        ctx.set_materialize_grads(False)
        if merged.entropy is not None and not entropy_gradient:
            ctx.mark_non_differentiable(merged.entropy)
        return merged.logprob, merged.entropy

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        logits, column, inverse_temperature, maximum, total, entropy = ctx.saved_tensors
        nothing = (None,) * 9
        if g is None and h is None:
            return None, *nothing
        # detach() shares memory and version counter with the logits, so autograd sees that they have changed.
        x = logits.detach()
        gradient = x if ctx.in_place else torch.empty_like(x)
        g = torch.zeros_like(total) if g is None else g
        inputs = GradientInputs(column, inverse_temperature, Merged(maximum, total, logprob=g, entropy=entropy), g, h)
        ctx.backend.gradient(x, inputs, valid=ctx.shard.valid, out=gradient)
        return gradient, *nothing


def refuse_double_backward() -> None:
    """Refuse to differentiate the gradient; to be called in a backward pass.

    Without it the gradient would count as a constant, and a penalty on it would silently do nothing.

    Raises:
        RuntimeError: the gradient itself is to be differentiated.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("logprob_and_entropy: differentiating the gradient (create_graph=True) is not supported")
