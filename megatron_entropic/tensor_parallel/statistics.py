"""Softmax statistics of vocabulary pieces, and how pieces merge into log-probability and entropy.

Shapes: T tokens, V columns of the whole vocabulary, R ranks, P pieces of V.

With x the raw logits, z = x / temperature and d = z - max z, a piece of the vocabulary is summarised per token by

    m = max x,   S = sum exp(d),   W = sum d exp(d),   t = x[target] if the piece owns the target, else 0

and pieces merge by log-sum-exp:

    M = max m_p,   delta_p = (m_p - M) / temperature,   c_p = exp(delta_p)
    S = sum c_p S_p,   W = sum c_p (W_p + delta_p S_p),   t = sum t_p
    logp = (t - M) / temperature - log S,   H = log S - W / S

Everything is centred on the maximum before it is scaled or summed: the usual logsumexp(z) - sum(p z) cancels two large
numbers, which costs up to 1e-3 nats in float32 at 152k columns, and more for logits with a common offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

INVARIANT_PIECES = 8
"""Number of pieces in which `layout_invariant` summarises the vocabulary.

They merge in order, 8 / R of them on each of R ranks. So every sum has the same terms in the same order, and the result
is the same bit for bit for R = 1, 2, 4, 8.
"""

MIN_EXPONENT = -200.0
"""Least exponent: its exp is 0 in float32. Clamped, since d exp(d) of a column masked with -inf would be NaN."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Columns of the vocabulary that this rank holds."""

    start: int
    """Token id of the first column."""
    width: int
    """Number of columns, padding included."""
    ranks: int
    """Number of ranks that share the vocabulary, R."""
    vocab_size: int
    """Number of token ids that exist; those from here on are padding and do not exist in the softmax."""

    @classmethod
    def of(cls, width: int, group: dist.ProcessGroup | None, vocab_size: int | None) -> Shard:
        """The shard of this rank of `group` (None: the only one); `vocab_size` None: no padding.

        Raises:
            ValueError: so many token ids do not fit.
        """
        ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        vocabulary = ranks * width if vocab_size is None else vocab_size
        if not 0 < vocabulary <= ranks * width:
            raise ValueError(f"vocab_size {vocabulary} does not fit {ranks} shards of {width} columns")
        return cls(start=rank * width, width=width, ranks=ranks, vocab_size=vocabulary)

    @property
    def valid(self) -> int:
        """Number of columns before the padding; they come first."""
        return min(max(self.vocab_size - self.start, 0), self.width)

    def columns(self, target: Tensor) -> Tensor:
        """Target token ids [T] as columns of this shard, -1 where another rank owns the target."""
        column = target - self.start
        return torch.where((column >= 0) & (column < self.valid), column, -1)


@dataclass(frozen=True, slots=True)
class Merged:
    """Statistics of the whole vocabulary, each [T] in the dtype of the arithmetic."""

    maximum: Tensor
    """Maximum M of the raw logits."""
    total: Tensor
    """Sum S = sum exp((x - M) / temperature)."""
    logprob: Tensor
    entropy: Tensor | None
    """Entropy in nats; None when it was not asked for."""


@dataclass(frozen=True, slots=True)
class GradientInputs:
    """What turns the logits of tokens into the gradient of the loss with respect to them, each [T]."""

    column: Tensor
    """The target as a column of this block or shard, int64; -1 where another one owns it."""
    inverse_temperature: Tensor
    merged: Merged
    """Statistics of the whole vocabulary; its log-probs are not read."""
    g: Tensor
    """Gradient of the loss with respect to the log-probability."""
    h: Tensor | None
    """Gradient of the loss with respect to the entropy; None is zero."""

    def of(self, tokens: slice) -> GradientInputs:
        """The inputs of some of the tokens."""
        merged, h = self.merged, None if self.h is None else self.h[tokens]
        entropy = None if merged.entropy is None else merged.entropy[tokens]
        some = Merged(merged.maximum[tokens], merged.total[tokens], merged.logprob[tokens], entropy)
        return GradientInputs(self.column[tokens], self.inverse_temperature[tokens], some, self.g[tokens], h)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic: float32 for every dtype but float64, which stays."""
    return torch.promote_types(dtype, torch.float32)


def piece_bounds(width: int, valid: int, pieces: int) -> list[tuple[int, int]]:
    """Bounds [begin, end) of equal pieces of `width` columns, cut off at `valid`; a piece of padding only is empty."""
    size = -(-width // pieces)
    return [(min(i * size, valid), min((i + 1) * size, valid)) for i in range(pieces)]


def empty_statistics(
    pieces: int, tokens: int, dtype: torch.dtype, device: torch.device, *, need_entropy: bool
) -> Tensor:
    """Uninitialised room for the statistics of `pieces` pieces, [P * k + 1, T], k = 2 or 3.

    For each piece its rows m, S and, with `need_entropy`, W; last row t of the whole shard. One piece with entropy is
    four numbers per token, in float32 16 bytes: all that a rank ever sends.
    """
    rows = pieces * (3 if need_entropy else 2) + 1
    return torch.empty(rows, tokens, dtype=arithmetic_dtype(dtype), device=device)


def by_piece(statistics: Tensor, *, need_entropy: bool) -> Tensor:
    """View of the rows of pieces: [..., P * k + 1, T] -> [..., P, k, T]."""
    return statistics[..., :-1, :].unflatten(-2, (-1, 3 if need_entropy else 2))


def combine(pieces: Tensor, inverse_temperature: Tensor) -> Tensor:
    """Combine m, S (and W) of pieces into those of their union, [P, k, T] -> [k, T], added in the order of the pieces.

    A union that is masked as a whole has m = -inf and S = W = 0, so that it can be part of another union.
    """
    maxima, sums = pieces[:, 0], pieces[:, 1]
    maximum = maxima.amax(0)
    delta = torch.where(maximum == -torch.inf, 0.0, maxima - maximum)
    delta = (delta * inverse_temperature).clamp_(min=MIN_EXPONENT)
    factor = delta.exp()
    rows = [maximum, (factor * sums).sum(0)]
    if pieces.shape[1] == 3:
        rows.append((factor * (pieces[:, 2] + delta * sums)).sum(0))
    return torch.stack(rows)


def merge(
    statistics: Tensor, target: Tensor, inverse_temperature: Tensor, vocab_size: int, *, need_entropy: bool
) -> Merged:
    """Compute log-probability and entropy from the statistics of all ranks.

    Args:
        statistics: [R, P * k + 1, T], see `empty_statistics`, in rank order.
        target: [T] token ids; one outside [0, vocab_size) gets the log-probability NaN, because no rank owns it and the
            result would otherwise look like a plausible number.
        inverse_temperature: [T].
        vocab_size: number of token ids that exist.
        need_entropy: whether the statistics hold W.
    """
    whole = combine(by_piece(statistics, need_entropy=need_entropy).flatten(0, 1), inverse_temperature)
    maximum, total = whole[0], whole[1]
    log_total = total.log()
    logprob = (statistics[:, -1].sum(0) - maximum) * inverse_temperature - log_total
    undefined = (target < 0) | (target >= vocab_size) | (maximum == -torch.inf)
    entropy = log_total - whole[2] / total if need_entropy else None
    return Merged(maximum, total, logprob.masked_fill(undefined, torch.nan), entropy)


def gather_and_merge(
    local: Tensor,
    target: Tensor,
    inverse_temperature: Tensor,
    shard: Shard,
    group: dist.ProcessGroup | None,
    *,
    need_entropy: bool,
) -> Merged:
    """Gather the statistics of all ranks by one collective, and merge them on every rank in the same order.

    Args:
        local: [P * k + 1, T], this rank's statistics, contiguous. With T = 0 nothing is sent.
        target: [T] token ids.
        inverse_temperature: [T].
        shard: columns of this rank.
        group: ranks that share the vocabulary; None: this rank holds it all.
        need_entropy: whether the statistics hold W.
    """
    gathered = local.unsqueeze(0)
    if shard.ranks > 1 and local.shape[1] > 0:
        gathered = torch.empty(shard.ranks, *local.shape, dtype=local.dtype, device=local.device)
        dist.all_gather(list(gathered), local, group=group)
    return merge(gathered, target, inverse_temperature, shard.vocab_size, need_entropy=need_entropy)
