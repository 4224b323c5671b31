"""Log-probability and entropy of tokens from logits whose vocabulary is sharded over tensor-parallel ranks.

Forward: one read of the logits shard, one all-gather of a few numbers per token. Backward: one read and one write, no
collective; the gradient replaces the logits in their own buffer. No rank ever holds the full vocabulary, and beside the
logits nothing larger than [T] outlives the call. This is the eager version: chunked PyTorch, any device.

    forward    see `statistics`
    backward   dx_v = 1/temperature * ( 1[v = target] g  -  p_v (g + h (log p_v + H)) )      g = dL/dlogp,  h = dL/dH
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.tensor_parallel.statistics import (
    MIN_EXPONENT,
    Merged,
    Shard,
    local_statistics,
    merge,
    row_chunks,
    scaled_distance,
    scratch,
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
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature)[target] and the entropy of that softmax, token by token.

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

    Returns:
        (logprob [T], entropy [T] in nats, or None without `need_entropy`).

    Raises:
        ValueError: shapes, dtypes or settings that do not go together.
        RuntimeError: in the backward pass, with create_graph=True, or when it runs a second time in place.

    Formula and trade-offs: docstring of `statistics`.
    """
    _check(logits, target, temperature, entropy_gradient=entropy_gradient, need_entropy=need_entropy)
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    width = logits.shape[1]
    vocabulary = ranks * width if vocab_size is None else vocab_size
    if not 0 < vocabulary <= ranks * width:
        raise ValueError(f"vocab_size {vocabulary} does not fit {ranks} shards of {width} columns")
    shard = Shard(start=rank * width, width=width, ranks=ranks, vocab_size=vocabulary)
    inverse = _inverse_temperature(temperature, logits)
    owner = logits if logits._base is None else logits._base
    logprob, entropy = _LogprobEntropy.apply(
        logits, target, inverse, shard, group, entropy_gradient, need_entropy, in_place and not owner.is_leaf
    )
    return logprob, entropy


def _check(
    logits: Tensor, target: Tensor, temperature: float | Tensor, *, entropy_gradient: bool, need_entropy: bool
) -> None:
    """Refuse what would otherwise broadcast or be silently wrong."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [T, V/R], got {logits.dtype} {tuple(logits.shape)}")
    if target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{len(logits)}], got {target.dtype} {tuple(target.shape)}")
    if isinstance(temperature, Tensor):
        if temperature.shape != target.shape:
            raise ValueError(f"temperature must be a number or [{len(logits)}], got {tuple(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"temperature must be > 0, not {temperature}")
    if entropy_gradient and not need_entropy:
        raise ValueError("entropy_gradient=True needs need_entropy=True")


def _inverse_temperature(temperature: float | Tensor, logits: Tensor) -> Tensor:
    """1 / temperature as [T] in the dtype of the arithmetic."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        return temperature.detach().to(logits.device, dtype).reciprocal()
    return torch.full((len(logits),), 1.0 / temperature, dtype=dtype, device=logits.device)


def _forward(
    logits: Tensor,
    target: Tensor,
    inverse_temperature: Tensor,
    shard: Shard,
    group: dist.ProcessGroup | None,
    need_entropy: bool,
) -> Merged:
    """Local statistics, the one collective, the merge that every rank does for itself in the same order."""
    local = local_statistics(logits, target, inverse_temperature, shard, need_entropy=need_entropy)
    gathered = local.unsqueeze(0)
    if shard.ranks > 1 and len(logits) > 0:
        gathered = torch.empty(shard.ranks, *local.shape, dtype=local.dtype, device=local.device)
        dist.all_gather(list(gathered), local, group=group)
    elif shard.ranks > 1:
        gathered = gathered.expand(shard.ranks, -1, -1)
    return merge(gathered, target, inverse_temperature, shard.vocab_size, need_entropy=need_entropy)


class _LogprobEntropy(torch.autograd.Function):
    """The differentiable form; `logprob_and_entropy` is its documentation."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        inverse_temperature: Tensor,
        shard: Shard,
        group: dist.ProcessGroup | None,
        entropy_gradient: bool,
        need_entropy: bool,
        in_place: bool,
    ) -> tuple[Tensor, Tensor | None]:
        merged = _forward(logits, target, inverse_temperature, shard, group, need_entropy)
        ctx.save_for_backward(
            logits,
            target,
            inverse_temperature,
            merged.maximum,
            merged.total,
            merged.entropy if entropy_gradient else None,
        )
        ctx.shard, ctx.in_place = shard, in_place
        ctx.set_materialize_grads(False)
        if merged.entropy is not None and not entropy_gradient:
            ctx.mark_non_differentiable(merged.entropy)
        return merged.logprob, merged.entropy

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Without this the gradient would count as a constant, and a penalty on it would silently do nothing.
            raise RuntimeError("logprob_and_entropy: differentiating the gradient (create_graph=True) is not supported")
        logits, target, inverse_temperature, maximum, total, entropy = ctx.saved_tensors
        nothing = (None,) * 7
        if g is None and h is None:
            return None, *nothing
        # detach() shares memory and version counter with the logits, so autograd sees that they have changed.
        x = logits.detach()
        gradient = x if ctx.in_place else torch.empty_like(x)
        g = torch.zeros_like(total) if g is None else g
        _write_gradient(x, target, inverse_temperature, maximum, total, entropy, g, h, ctx.shard, gradient)
        return gradient, *nothing


def _write_gradient(
    x: Tensor,
    target: Tensor,
    inverse_temperature: Tensor,
    maximum: Tensor,
    total: Tensor,
    entropy: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    shard: Shard,
    out: Tensor,
) -> None:
    """out [T, V/R] = dL/dlogits, which may be the buffer of the logits x itself.

    With d = (x - M) / temperature, p = exp(d) / S and log p + H = d + (H - log S), a row is
    k exp(d) (g + h (H - log S) + h d) with k = -1 / (temperature S), plus g / temperature in the target's column. That
    one is added before rounding to the logits' dtype: for a confident token the two nearly cancel.
    """
    n = shard.valid
    out[:, n:].zero_()
    if n == 0:
        return
    scale = -inverse_temperature / total
    constant = g * scale
    if h is not None:
        assert entropy is not None, "a gradient for an entropy that is not differentiable"
        slope = h * scale
        constant = constant + slope * (entropy - total.log())
    column, owned = shard.owned(target, 0, n)
    own = torch.where(owned, g * inverse_temperature, 0.0)
    buffers = scratch(x, n)
    for rows in row_chunks(len(x), n, x.device):
        d, e = (buffer[: rows.stop - rows.start] for buffer in buffers)
        scaled_distance(x[rows, :n], maximum[rows, None], inverse_temperature[rows, None], out=d)
        if h is None:
            d.exp_().mul_(constant[rows, None])
        else:
            d.clamp_(min=MIN_EXPONENT)
            torch.exp(d, out=e)
            d.mul_(slope[rows, None]).add_(constant[rows, None]).mul_(e)
        d.scatter_add_(1, column[rows, None], own[rows, None])
        out[rows, :n].copy_(d)
