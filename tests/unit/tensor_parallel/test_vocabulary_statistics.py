"""Shards of a vocabulary merged by hand, without processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_entropic.tensor_parallel.eager import CACHE_CHUNK_BYTES, EagerBackend, _row_chunks
from megatron_entropic.tensor_parallel.statistics import (
    Merged,
    Shard,
    by_piece,
    combine,
    empty_statistics,
    merge,
    piece_bounds,
)


def merged_over(
    ranks: int, logits: Tensor, target: Tensor, vocab_size: int, temperature: float = 1.0, pieces: int | None = None
) -> Merged:
    width = logits.shape[1] // ranks
    inverse = torch.full((len(logits),), 1 / temperature)
    count = 8 // ranks if pieces is None else pieces
    parts = []
    for rank in range(ranks):
        shard = Shard(rank * width, width, ranks, vocab_size)
        part = empty_statistics(count, len(logits), logits.dtype, logits.device, need_entropy=True)
        block = logits[:, rank * width : (rank + 1) * width]
        EagerBackend().statistics(block, shard.columns(target), inverse, valid=shard.valid, pieces=count, out=part)
        parts.append(part)
    return merge(torch.stack(parts), target, inverse, vocab_size, need_entropy=True)


@pytest.mark.parametrize("vocab_size", [4096, 3000, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_identical_for_1_2_4_and_8_ranks(vocab_size: int, dtype: torch.dtype) -> None:
    """Also with padding that fills whole pieces and whole ranks."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(700, 4096, generator=generator) * 4).to(dtype)
    target = torch.randint(vocab_size, (700,), generator=generator)
    one = merged_over(1, logits, target, vocab_size, 0.6)
    want = (logits[:, :vocab_size].double() / 0.6).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(one.logprob.double(), want, rtol=1e-6, atol=5e-6)
    for ranks in (2, 4, 8):
        other = merged_over(ranks, logits, target, vocab_size, 0.6)
        assert torch.equal(one.logprob, other.logprob)
        assert torch.equal(one.entropy, other.entropy)
        assert torch.equal(one.maximum, other.maximum)
        assert torch.equal(one.total, other.total)


@pytest.mark.parametrize("ranks", [3, 5, 16])
def test_other_numbers_of_ranks_agree_closely(ranks: int) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(20, 240 * ranks, generator=generator)
    target = torch.randint(240 * ranks, (20,), generator=generator)
    one, other = (merged_over(n, logits, target, 240 * ranks, pieces=1) for n in (1, ranks))
    torch.testing.assert_close(one.logprob, other.logprob, rtol=0, atol=2e-6)
    torch.testing.assert_close(one.entropy, other.entropy, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("start", "vocab_size", "valid"), [(0, 100, 40), (40, 60, 20), (40, 40, 0), (80, 50, 0)])
def test_pieces_cover_the_valid_columns_once(start: int, vocab_size: int, valid: int) -> None:
    shard = Shard(start, 40, 2, vocab_size)
    bounds = piece_bounds(shard.width, shard.valid, 4)
    assert [column for begin, end in bounds for column in range(begin, end)] == list(range(valid))
    assert len(bounds) == 4


def test_one_piece_is_sixteen_bytes_a_token() -> None:
    statistics = empty_statistics(1, 10, torch.bfloat16, torch.device("cpu"), need_entropy=True)
    assert statistics.numel() * statistics.element_size() == 16 * 10


def test_a_union_without_any_column_takes_part_in_the_next() -> None:
    """m = -inf, S = W = 0: what a rank of padding, or of masked columns only, sends."""
    nothing = torch.tensor([[-torch.inf], [0.0], [0.0]])
    something = torch.tensor([[2.0], [1.5], [-0.5]])
    inverse = torch.ones(1)
    assert torch.equal(combine(torch.stack([nothing, nothing]), inverse), nothing)
    assert torch.equal(combine(torch.stack([nothing, something]), inverse), something)


def test_pieces_and_the_target_are_apart() -> None:
    statistics = torch.arange(7.0)[:, None]
    assert by_piece(statistics, need_entropy=True).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert by_piece(statistics, need_entropy=False).shape == (3, 2, 1)


def test_row_chunks_cover_every_row_once() -> None:
    chunks = list(_row_chunks(1000, 152064, torch.device("cpu")))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(1000))
    assert max(chunk.stop - chunk.start for chunk in chunks) * 152064 * 4 <= CACHE_CHUNK_BYTES
