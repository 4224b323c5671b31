"""Fused attention of packed sequences, and the kernels of its context parallelism, in PyTorch on a CPU.

Transformer Engine's own exchange of keys and values between context-parallel ranks runs on them. A rank holds two
halves of every sequence, a chunk from its front and one from its back; the kernels read and correct one of them.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def _segments(lengths: torch.Tensor, starts: torch.Tensor | None) -> Iterator[slice]:
    """Rows of each sequence; `lengths` and `starts` are both cumulative."""
    borders = (lengths if starts is None else starts).tolist()
    for start, length in zip(borders, lengths.diff().tolist(), strict=False):
        yield slice(start, start + length)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """[heads, queries, keys]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        assert q.shape[0] == k.shape[0], "a causal mask is for queries and keys of the same tokens"
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
    return scores


def fused_attn_fwd(
    _max_q: int, _max_kv: int, _training: bool, scale: float, dropout: float, *rest: Any
) -> list[torch.Tensor]:
    """[output [t, heads, width], log of the softmax's denominator [t, heads, 1], state of a generator]."""
    mask, cu_q, cu_kv, q, k, v, starts_q, starts_kv = rest[5], *rest[9:14], *rest[15:17]
    assert dropout == 0.0
    output = q.new_zeros(*q.shape[:-1], v.shape[-1])
    denominators = torch.full((*q.shape[:-1], 1), float("nan"))
    groups = q.shape[1] // k.shape[1]
    for rows, keys in zip(_segments(cu_q, starts_q), _segments(cu_kv, starts_kv), strict=True):
        key, value = (t[keys].float().repeat_interleave(groups, dim=1) for t in (k, v))
        scores = _scores(q[rows].float(), key, scale, "CAUSAL" in mask.name)
        output[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).to(q.dtype)
        denominators[rows] = scores.logsumexp(-1).t().unsqueeze(-1)
    return [output, denominators, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(_max_q: int, _max_kv: int, scale: float, dropout: float, *rest: Any) -> list[torch.Tensor | None]:
    """[gradients of queries, keys and values, nothing]; probabilities are those of the denominators handed in."""
    mask, cu_q, cu_kv, q, k, v, out, d_out, saved, starts_q, starts_kv = rest[8], *rest[13:20], *rest[21:24]
    assert dropout == 0.0
    gradients = [torch.zeros_like(tensor) for tensor in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    for rows, keys in zip(_segments(cu_q, starts_q), _segments(cu_kv, starts_kv), strict=True):
        query, d_output = q[rows].float(), d_out[rows].float()
        key, value = (t[keys].float().repeat_interleave(groups, dim=1) for t in (k, v))
        scores = _scores(query, key, scale, "CAUSAL" in mask.name)
        probabilities = (scores - saved[0][rows].squeeze(-1).t().unsqueeze(-1)).exp()
        own = (out[rows].float() * d_output).sum(-1).t().unsqueeze(-1)
        d_scores = probabilities * (torch.einsum("qhd,khd->hqk", d_output, value) - own) * scale
        parts = (
            (gradients[0], rows, torch.einsum("hqk,khd->qhd", d_scores, key)),
            (gradients[1], keys, torch.einsum("hqk,qhd->khd", d_scores, query)),
            (gradients[2], keys, torch.einsum("hqk,qhd->khd", probabilities, d_output)),
        )
        for gradient, where, part in parts:
            # Heads that share keys and values add up their gradients.
            gradient[where] = part.unflatten(1, (gradient.shape[1], -1)).sum(2).to(gradient.dtype)
    return [*gradients, None]


def _half(cu_seqlens: torch.Tensor, half: int) -> torch.Tensor:
    """Rows of the first or second half of every sequence."""
    borders = cu_seqlens.tolist()
    middles = [(start + end) // 2 for start, end in itertools.pairwise(borders)]
    halves = zip(middles, borders[1:], strict=True) if half else zip(borders, middles, strict=False)
    return torch.cat([torch.arange(start, end) for start, end in halves])


def thd_read_half_tensor(tensor: torch.Tensor, cu_seqlens: torch.Tensor, half: int) -> torch.Tensor:
    """[t / 2, heads, width]."""
    return tensor[_half(cu_seqlens, half)]


def thd_read_second_half_lse(lse: torch.Tensor, cu_seqlens: torch.Tensor, packed: bool, *_: Any) -> torch.Tensor:
    """[heads, t / 2]."""
    assert packed
    return lse[:, _half(cu_seqlens, 1)]


def thd_second_half_lse_correction(
    lse: torch.Tensor, of_step: torch.Tensor, cu_seqlens: torch.Tensor, packed: bool
) -> None:
    """Adds a step's denominators [heads, t / 2] to those of the second halves, in place."""
    assert packed
    rows = _half(cu_seqlens, 1)
    lse[:, rows] = torch.logaddexp(lse[:, rows], of_step)


def thd_out_correction(
    out: torch.Tensor,
    of_step: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    step: torch.Tensor,
    cu_seqlens: torch.Tensor,
    only_second_half: bool,
    packed: bool,
) -> None:
    """Adds a step's output to the sum so far, both weighted by their part of the denominator, in place."""
    assert packed
    rows = _half(cu_seqlens, 1) if only_second_half else torch.arange(out.shape[0])
    kept, added = (before[:, rows] - after[:, rows]).exp(), (step - after[:, rows]).exp()
    out[rows] = out[rows] * kept.t().unsqueeze(-1) + of_step.view(-1, *out.shape[1:]) * added.t().unsqueeze(-1)


def thd_grad_correction(
    gradient: torch.Tensor, of_step: torch.Tensor, cu_seqlens: torch.Tensor, first: str, second: str
) -> None:
    """Copies or adds a step's gradient, in place; where a half gets nothing of it, it is that of the other half."""
    whole = of_step.shape[0] == gradient.shape[0]
    for half, what in enumerate((first, second)):
        rows = _half(cu_seqlens, half)
        if what == "zero":
            gradient[rows] = 0.0
        elif what in ("copy", "add"):
            part = of_step[rows] if whole else of_step
            gradient[rows] = part if what == "copy" else gradient[rows] + part
        else:
            assert what == "none", what


FUNCTIONS = (
    fused_attn_fwd,
    fused_attn_bwd,
    thd_read_half_tensor,
    thd_read_second_half_lse,
    thd_second_half_lse_correction,
    thd_out_correction,
    thd_grad_correction,
)


class _Ended:
    """An exchange that is over."""

    def wait(self) -> bool:
        return True


def gather_in_the_backward_ring() -> None:
    """Lets the ring of the backward pass exchange by all-gather; that of the forward pass sends and receives.

    Over gloo (torch 2.13) the backward pass's first pair of a send and a receive never ends, both ranks having begun it
    with the same sizes. The same pair ends in the forward pass, and in a function of autograd of plain tensors.
    """
    module: Any = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.context_parallel")
    attention = module.AttnFuncWithCPAndKVP2P
    exchange, backward = module.flash_attn_p2p_communicate, attention.backward

    def gather(
        _rank: int, sent: torch.Tensor, _to: int, received: torch.Tensor, source: int, group: Any, _batch: bool
    ) -> list[_Ended]:
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, sent.contiguous(), group=group)
        received.copy_(parts[dist.get_group_rank(group, source)])
        return [_Ended()]

    def gathering(context: Any, *gradients: Any) -> Any:
        module.flash_attn_p2p_communicate = gather
        try:
            return backward(context, *gradients)
        finally:
            module.flash_attn_p2p_communicate = exchange

    attention.backward = staticmethod(gathering)
