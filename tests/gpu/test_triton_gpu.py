"""The Triton backend on a GPU, at the sizes it is for, against float64, against eager, and over ranks.

Ranks are simulated by merging their statistics by hand; NCCL takes part with one rank.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_entropic.tensor_parallel import logprob_and_entropy
from megatron_entropic.tensor_parallel.backends import Backend, select_backend
from megatron_entropic.tensor_parallel.eager import EagerBackend
from megatron_entropic.tensor_parallel.statistics import GradientInputs, Merged, Shard, empty_statistics, merge
from megatron_entropic.tensor_parallel.triton_backend import TritonBackend

VOCABULARY = 151936
ENTROPY_LIMIT = 5e-6
GRADIENT_LIMIT = 1e-5
TRITON = TritonBackend()


def example(
    device: torch.device, tokens: int, columns: int = VOCABULARY, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(tokens, columns, generator=generator, device=device).mul_(3).to(dtype)
    return logits, torch.randint(columns, (tokens,), generator=generator, device=device)


def incoming(device: torch.device, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """1 / temperature, g and h, different for every token."""
    ends = ((0.5, 2.0), (-1.5, 2.0), (1.0, -3.0))
    inverse, g, h = (torch.linspace(first, last, tokens, device=device) for first, last in ends)
    return inverse, g, h


def reference(
    logits: Tensor, target: Tensor, inverse: Tensor, g: Tensor, h: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and the gradient [T, V] in float64."""
    leaf = logits.double().requires_grad_()
    logp = (leaf[:, :vocab_size] * inverse.double()[:, None]).log_softmax(-1)
    taken = logp.exp()
    entropy = -(taken * logp.masked_fill(taken == 0, 0.0)).sum(-1)
    logprob = logp.gather(1, target[:, None]).squeeze(1)
    loss = logprob @ g.double()
    (gradient,) = torch.autograd.grad(loss if h is None else loss + entropy @ h.double(), leaf)
    return logprob.detach(), entropy.detach(), gradient


def forward(
    backend: Backend,
    ranks: int,
    logits: Tensor,
    target: Tensor,
    inverse: Tensor,
    vocab_size: int,
    *,
    pieces: int = 1,
) -> Merged:
    """What the statistics of all ranks merge to; each rank's block has rows of its own."""
    width = logits.shape[1] // ranks
    parts = []
    for rank in range(ranks):
        shard = Shard(rank * width, width, ranks, vocab_size)
        block = logits[:, shard.start : shard.start + width].contiguous()
        part = empty_statistics(pieces, len(block), block.dtype, block.device, need_entropy=True)
        backend.statistics(block, shard.columns(target), inverse, valid=shard.valid, pieces=pieces, out=part)
        parts.append(part)
    return merge(torch.stack(parts), target, inverse, vocab_size, need_entropy=True)


def backward(
    backend: Backend,
    ranks: int,
    logits: Tensor,
    target: Tensor,
    inverse: Tensor,
    merged: Merged,
    g: Tensor,
    h: Tensor | None,
    vocab_size: int,
) -> Tensor:
    """[T, V] gradient, each rank's written over a copy of its logits."""
    width = logits.shape[1] // ranks
    blocks = []
    for rank in range(ranks):
        shard = Shard(rank * width, width, ranks, vocab_size)
        block = logits[:, shard.start : shard.start + width].clone(memory_format=torch.contiguous_format)
        inputs = GradientInputs(shard.columns(target), inverse, merged, g, h)
        backend.gradient(block, inputs, valid=shard.valid, out=block)
        blocks.append(block)
    return torch.cat(blocks, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_together_match_float64(gpu: torch.device, ranks: int, dtype: torch.dtype) -> None:
    """Padding takes half of the last eighth."""
    vocab_size = VOCABULARY - VOCABULARY // 16
    logits, target = example(gpu, 256, dtype=dtype)
    target = target % vocab_size
    inverse, g, h = incoming(gpu, 256)
    merged = forward(TRITON, ranks, logits, target, inverse, vocab_size)
    for slope in (None, h):
        gradient = backward(TRITON, ranks, logits, target, inverse, merged, g, slope, vocab_size)
        logprob, entropy, exact = reference(logits, target, inverse, g, slope, vocab_size)
        torch.testing.assert_close(merged.logprob.double(), logprob, rtol=1e-6, atol=5e-6)
        assert (merged.entropy.double() - entropy).abs().max() <= ENTROPY_LIMIT
        assert bool((gradient[:, vocab_size:] == 0).all())
        if dtype == torch.float32:
            assert float((gradient.double() - exact).norm() / exact.norm()) <= GRADIENT_LIMIT
        else:
            torch.testing.assert_close(gradient.double(), exact, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eighths_of_the_vocabulary_give_the_same_bits_over_ranks(gpu: torch.device, dtype: torch.dtype) -> None:
    logits, target = example(gpu, 512, dtype=dtype)
    inverse, _, _ = incoming(gpu, 512)
    one = forward(TRITON, 1, logits, target, inverse, VOCABULARY, pieces=8)
    for ranks in (2, 4, 8):
        other = forward(TRITON, ranks, logits, target, inverse, VOCABULARY, pieces=8 // ranks)
        for name in ("logprob", "entropy", "maximum", "total"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_an_offset_changes_nothing(gpu: torch.device, offset: float) -> None:
    logits, target = example(gpu, 64)
    logits = (logits * 1024).round() / 1024 + offset
    inverse, g, h = incoming(gpu, 64)
    merged = forward(TRITON, 2, logits, target, inverse, VOCABULARY)
    gradient = backward(TRITON, 2, logits, target, inverse, merged, g, h, VOCABULARY)
    logprob, entropy, exact = reference(logits, target, inverse, g, h, VOCABULARY)
    torch.testing.assert_close(merged.logprob.double(), logprob, rtol=1e-6, atol=5e-6)
    assert (merged.entropy.double() - entropy).abs().max() <= ENTROPY_LIMIT
    assert float((gradient.double() - exact).norm() / exact.norm()) <= GRADIENT_LIMIT


def test_masked_columns_count_for_nothing_and_a_nan_shows(gpu: torch.device) -> None:
    logits, target = example(gpu, 8, 4 * 4096)
    target[:] = 4097
    logits[:, ::2] = -torch.inf
    logits[0, :4096] = -torch.inf
    logits[6] = -torch.inf
    logits[7, 5000] = torch.nan
    inverse, g, h = incoming(gpu, 8)
    merged = forward(TRITON, 4, logits, target, inverse, 4 * 4096)
    gradient = backward(TRITON, 4, logits, target, inverse, merged, g, h, 4 * 4096)
    assert merged.logprob.isnan().tolist() == merged.entropy.isnan().tolist() == [False] * 6 + [True] * 2
    logprob, entropy, exact = reference(logits[:6], target[:6], inverse[:6], g[:6], h[:6], 4 * 4096)
    torch.testing.assert_close(merged.logprob[:6].double(), logprob, rtol=1e-6, atol=5e-6)
    assert (merged.entropy[:6].double() - entropy).abs().max() <= ENTROPY_LIMIT
    torch.testing.assert_close(gradient[:6].double(), exact.nan_to_num(0.0), rtol=1e-4, atol=1e-6)
    assert bool((gradient[:6][logits[:6] == -torch.inf] == 0).all())
    assert bool(gradient[6:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("first", "columns"), [(0, 32000), (1, 32000), (8, 31999), (16, 1), (16, 700)])
def test_a_block_inside_a_wider_matrix_agrees_with_eager(
    gpu: torch.device, first: int, columns: int, dtype: torch.dtype
) -> None:
    """Also where rows are not aligned to 16 bytes; columns beside the block keep what they hold."""
    wide = torch.full((33, 32016), torch.nan, device=gpu, dtype=dtype)
    block = wide[:, first : first + columns]
    logits, target = example(gpu, 33, columns, dtype)
    block.copy_(logits)
    inverse, g, h = incoming(gpu, 33)
    got, want = (forward(backend, 1, block, target, inverse, columns) for backend in (TRITON, EagerBackend()))
    torch.testing.assert_close(got.logprob, want.logprob, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=0, atol=ENTROPY_LIMIT)
    exact = backward(EagerBackend(), 1, block, target, inverse, want, g, h, columns)
    TRITON.gradient(block, GradientInputs(target, inverse, got, g, h), valid=columns, out=block)
    torch.testing.assert_close(
        block, exact, rtol={torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype], atol=2e-6
    )
    assert bool(wide[:, :first].isnan().all())
    assert bool(wide[:, first + columns :].isnan().all())


def test_more_logits_than_a_32_bit_offset_reaches(gpu: torch.device) -> None:
    tokens = 2**31 // VOCABULARY + 100
    logits = torch.zeros(tokens, VOCABULARY, device=gpu, dtype=torch.bfloat16)
    last, target = example(gpu, 1, dtype=torch.bfloat16)
    logits[-1] = last[0]
    base = torch.zeros((), device=gpu, dtype=torch.bfloat16, requires_grad=True)
    computed = logits.add_(base)
    logprob, entropy = logprob_and_entropy(computed, target.expand(tokens), entropy_gradient=True, backend="triton")
    alone = forward(TRITON, 1, last, target, torch.ones(1, device=gpu), VOCABULARY)
    assert logprob[-1] == alone.logprob[0]
    assert entropy[-1] == alone.entropy[0]
    (gradient,) = torch.autograd.grad(logprob.sum() + entropy.sum(), computed)
    ones = torch.ones(1, device=gpu)
    want = backward(TRITON, 1, last, target, ones, alone, ones, ones, VOCABULARY)
    assert torch.equal(gradient[-1], want[0])


def test_auto_is_triton_and_allocates_nothing_of_the_size_of_the_logits(gpu: torch.device) -> None:
    assert isinstance(select_backend("auto", gpu), TritonBackend)
    logits, target = example(gpu, 1024, dtype=torch.bfloat16)
    base = torch.zeros((), device=gpu, dtype=torch.bfloat16, requires_grad=True)
    computed = logits.add_(base)
    before = torch.cuda.memory_allocated(gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    logprob, entropy = logprob_and_entropy(computed, target, temperature=0.7, entropy_gradient=True)
    (gradient,) = torch.autograd.grad(logprob.sum() + entropy.sum(), computed, retain_graph=True)
    assert torch.cuda.max_memory_allocated(gpu) - before <= 0.01 * logits.nbytes
    assert gradient.data_ptr() == computed.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.sum().backward()


@pytest.mark.parametrize("layout_invariant", [False, True])
def test_a_group_of_one_rank_changes_nothing(
    gpu: torch.device, nccl: dist.ProcessGroup, layout_invariant: bool
) -> None:
    logits, target = example(gpu, 64, dtype=torch.bfloat16)
    alone, grouped = (
        logprob_and_entropy(logits, target, group=group, layout_invariant=layout_invariant) for group in (None, nccl)
    )
    assert torch.equal(alone[0], grouped[0])
    assert torch.equal(alone[1], grouped[1])


def test_a_product_of_bfloat16_comes_out_in_float32(gpu: torch.device) -> None:
    """Not rounded to bfloat16 on the way, which would cost 2e-2 in a log-probability."""
    generator = torch.Generator(gpu).manual_seed(0)
    a = torch.randn(512, 1024, generator=generator, device=gpu).bfloat16()
    b = torch.randn(1024, 4096, generator=generator, device=gpu).bfloat16()
    product = torch.mm(a, b, out_dtype=torch.float32)
    assert product.dtype == torch.float32
    assert bool((product != product.bfloat16()).float().mean() > 0.9)
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-3)
