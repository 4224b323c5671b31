"""Softmax statistics of vocabulary pieces, and how pieces merge into log-probability and entropy.

Shapes: T tokens, V columns of the whole vocabulary, R ranks, P pieces of V.

With x the raw logits, z = x / temperature and d = z - max z, a piece of the vocabulary is summarised per token by

    m = max x,   S = sum exp(d),   W = sum d exp(d),   t = x[target] if the piece owns the target, else 0

and pieces merge by log-sum-exp:

    M = max m_p,   delta_p = (m_p - M) / temperature,   c_p = exp(delta_p)
    S = sum c_p S_p,   W = sum c_p (W_p + delta_p S_p)
    logp = (t - M) / temperature - log S,   H = log S - W / S

Everything is centred on the maximum before it is scaled or summed: the usual logsumexp(z) - sum(p z) cancels two large
numbers, which costs up to 1e-3 nats in float32 at 152k columns, and more for logits with a common offset.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PIECES = 8
"""The vocabulary is summarised in 8 pieces that merge in order, 8 / R of them on each of R ranks. So every sum has the
same terms in the same order, and the result is the same bit for bit, for R = 1, 2, 4 and 8 (V / 8 being an integer)."""

MIN_EXPONENT = -200.0
"""exp of it is 0 in float32. Exponents are clamped here because d exp(d) of a column masked with -inf would be NaN."""

CACHE_CHUNK_BYTES = 2 << 20
"""Scratch on a CPU stays in its cache: measured 3x faster than full-sized temporaries."""

ACCELERATOR_CHUNK_BYTES = 64 << 20
"""Scratch on an accelerator: enough work for each kernel, small against a micro-batch's logits."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Which columns of the vocabulary this rank's logits hold."""

    start: int
    """First column's token id."""
    width: int
    """Columns, padding included."""
    ranks: int
    """R, ranks that share the vocabulary."""
    vocab_size: int
    """Token ids from here on are padding; they do not exist in the softmax."""

    @property
    def valid(self) -> int:
        """Columns before the padding; they come first."""
        return min(max(self.vocab_size - self.start, 0), self.width)

    def pieces(self) -> list[tuple[int, int]]:
        """This rank's pieces as [begin, end) among the valid columns; a piece of padding only is empty."""
        count = PIECES // self.ranks if PIECES % self.ranks == 0 else 1
        size = -(-self.width // count)
        return [(min(i * size, self.valid), min((i + 1) * size, self.valid)) for i in range(count)]

    def owned(self, target: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Targets [T] as columns of [begin, end), and whether they lie there; those that do not are column 0."""
        column = target - (self.start + begin)
        owned = (column >= 0) & (column < end - begin)
        return torch.where(owned, column, 0), owned


@dataclass(frozen=True, slots=True)
class Merged:
    """Statistics of the whole vocabulary, each [T] in the dtype of the arithmetic."""

    maximum: Tensor
    """M, of raw logits."""
    total: Tensor
    """S = sum exp((x - M) / temperature)."""
    logprob: Tensor
    entropy: Tensor | None
    """Nats; None when it was not asked for."""


def arithmetic_dtype(logits: Tensor) -> torch.dtype:
    """float32 for every logits dtype but float64, which stays."""
    return torch.promote_types(logits.dtype, torch.float32)


def row_chunks(tokens: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of tokens whose float32 scratch of `columns` columns fits the chunk size of the device."""
    limit = CACHE_CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    rows = max(1, limit // (4 * max(columns, 1)))
    for begin in range(0, tokens, rows):
        yield slice(begin, min(begin + rows, tokens))


def scratch(logits: Tensor, columns: int) -> Tensor:
    """Two buffers [2, rows of a chunk, columns], uninitialised."""
    rows = max((chunk.stop - chunk.start for chunk in row_chunks(len(logits), columns, logits.device)), default=0)
    return torch.empty(2, rows, columns, dtype=arithmetic_dtype(logits), device=logits.device)


def local_statistics(
    logits: Tensor, target: Tensor, inverse_temperature: Tensor, shard: Shard, *, need_entropy: bool
) -> Tensor:
    """Statistics of this rank's pieces in one read of the logits, which stay as they are.

    Args:
        logits: [T, V/R].
        target: [T] token ids of the whole vocabulary.
        inverse_temperature: [T].
        shard: the columns of `logits`.
        need_entropy: whether W is computed.

    Returns:
        [P * k + 1, T]: for each piece its rows m, S and, with `need_entropy`, W (k = 2 or 3); last row t.
    """
    pieces = shard.pieces()
    kinds = 3 if need_entropy else 2
    statistics = torch.zeros(len(pieces) * kinds + 1, len(logits), dtype=arithmetic_dtype(logits), device=logits.device)
    by_piece = statistics[:-1].view(len(pieces), kinds, -1)
    by_piece[:, 0] = -torch.inf
    for (begin, end), out in zip(pieces, by_piece, strict=True):
        if begin < end:
            _piece_statistics(logits[:, begin:end], inverse_temperature, out)
    if shard.valid:
        column, owned = shard.owned(target, 0, shard.valid)
        own = logits.gather(1, column[:, None]).squeeze(1).to(statistics.dtype)
        statistics[-1] = torch.where(owned, own, 0.0)
    return statistics


def _piece_statistics(x: Tensor, inverse_temperature: Tensor, out: Tensor) -> None:
    """Fill out [k, T] with m, S (and W) of the columns x [T, n], chunk of rows by chunk of rows."""
    buffers = scratch(x, x.shape[1])
    for rows in row_chunks(len(x), x.shape[1], x.device):
        chunk = x[rows]
        d, e = buffers[0, : len(chunk)], buffers[1, : len(chunk)]
        maximum = torch.amax(chunk, -1, keepdim=True).to(d.dtype)
        # A piece masked as a whole has m = -inf; centred on 0 instead, its exponents stay -inf and S = W = 0.
        centre = maximum.masked_fill(maximum == -torch.inf, 0.0)
        scaled_distance(chunk, centre, inverse_temperature[rows, None], out=d)
        torch.exp(d, out=e)
        out[0, rows] = maximum.squeeze(1)
        out[1, rows] = e.sum(-1)
        if len(out) == 3:
            out[2, rows] = d.clamp_(min=MIN_EXPONENT).mul_(e).sum(-1)


def scaled_distance(x: Tensor, centre: Tensor, inverse_temperature: Tensor, *, out: Tensor) -> None:
    """out = (x - centre) / temperature without a temporary; x [c, n] of any dtype, the others [c, 1]."""
    if x.dtype == out.dtype:
        torch.sub(x, centre, out=out)
    else:
        out.copy_(x).sub_(centre)
    out.mul_(inverse_temperature)


def merge(
    statistics: Tensor, target: Tensor, inverse_temperature: Tensor, vocab_size: int, *, need_entropy: bool
) -> Merged:
    """Log-probability and entropy from the statistics of all ranks, in rank order.

    Args:
        statistics: [R, P * k + 1, T] as `local_statistics` of each rank gave them.
        target: [T] token ids; one outside [0, vocab_size) gets the log-probability NaN, because no rank owns it and the
            result would otherwise look like a plausible number.
        inverse_temperature: [T].
        vocab_size: number of token ids that exist.
        need_entropy: as given to `local_statistics`.
    """
    by_piece = statistics[:, :-1].unflatten(1, (-1, 3 if need_entropy else 2)).flatten(0, 1)
    maxima, sums = by_piece[:, 0], by_piece[:, 1]
    maximum = maxima.amax(0)
    delta = ((maxima - maximum) * inverse_temperature).clamp(min=MIN_EXPONENT)
    factor = delta.exp()
    total = (factor * sums).sum(0)
    log_total = total.log()
    own = statistics[:, -1].sum(0)
    logprob = (own - maximum) * inverse_temperature - log_total
    logprob = logprob.masked_fill((target < 0) | (target >= vocab_size), torch.nan)
    entropy = None
    if need_entropy:
        weighted = (factor * (by_piece[:, 2] + delta * sums)).sum(0)
        entropy = log_total - weighted / total
    return Merged(maximum, total, logprob, entropy)
