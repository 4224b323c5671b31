"""How context parallelism cuts a packed micro-batch: each segment into 2 * size chunks, two for each rank.

    size 2, a segment of 8 tokens      chunk 0 | 1 | 2 | 3
    rank 0 holds                             0           3         local tokens t0 t1 t6 t7
    rank 1 holds                                 1   2             local tokens t2 t3 t4 t5

Rank r holds chunks r and 2 * size - 1 - r, so that under the causal mask all ranks have the same attention work. It is
the order that megatron-core's RoPE and Transformer Engine's attention expect of packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ContextCut:
    """One rank's part of every segment; the default is all of it."""

    rank: int = 0
    size: int = 1

    @property
    def segment_multiple(self) -> int:
        """Each segment is padded to a multiple of this, so that its chunks are equal."""
        return 2 * self.size if self.size > 1 else 1

    @property
    def chunks(self) -> tuple[int, ...]:
        """Which chunks of a segment this rank holds, in its order."""
        return (self.rank, 2 * self.size - 1 - self.rank) if self.size > 1 else (0,)

    def positions(self, lengths: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        """[T / size] int64: the position of each token of this rank within its segment.

        Args:
            lengths: [segments] int64, padded lengths.
            tokens: T / size where the caller knows it, so that a GPU need not be waited for.
        """
        own = lengths // self.size
        count = int(own.sum()) if tokens is None else tokens
        starts = (own.cumsum(0) - own).repeat_interleave(own, output_size=count)
        within = torch.arange(count, device=lengths.device) - starts
        if self.size == 1:
            return within
        chunk = (own // 2).repeat_interleave(own, output_size=count)
        first, second = self.chunks
        return torch.where(within < chunk, within + first * chunk, within + (second - 1) * chunk)

    def rows(self, lengths: torch.Tensor) -> torch.Tensor:
        """[T / size] int64: the row in the whole micro-batch of each token of this rank; lengths as in `positions`."""
        starts = lengths.cumsum(0) - lengths
        return self.positions(lengths) + starts.repeat_interleave(lengths // self.size)


WHOLE = ContextCut()
"""Without context parallelism."""
