"""Tests of the Triton backend on a CPU, for a pytest that runs with TRITON_INTERPRET=1: the kernels line by line.

Sizes are chosen so that a row takes several tiles of a program of four warps, with a remainder.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_entropic.tensor_parallel import logprob_and_entropy
from megatron_entropic.tensor_parallel.eager import EagerBackend
from megatron_entropic.tensor_parallel.statistics import GradientInputs, Merged, Shard, empty_statistics, merge
from megatron_entropic.tensor_parallel.triton_backend import TritonBackend

TRITON = TritonBackend()
ENTROPY_LIMIT = 5e-6
GRADIENT_LIMIT = 1e-5
BFLOAT16_LIMIT = 2**-7
"""Of one element: the interpreter cuts digits off where a GPU rounds."""


def example(tokens: int, columns: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, columns, generator=generator) * 4
    return logits.to(dtype), torch.randint(columns, (tokens,), generator=generator)


def incoming(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """1 / temperature, g and h, different for every token."""
    inverse = torch.linspace(0.4, 2.5, tokens)
    return inverse, torch.linspace(-1.5, 2.0, tokens), torch.linspace(1.0, -3.0, tokens)


def reference(
    logits: Tensor, target: Tensor, inverse: Tensor, g: Tensor, h: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and the gradient [T, V] in float64."""
    leaf = logits.double().requires_grad_()
    logp = (leaf[:, :vocab_size] * inverse.double()[:, None]).log_softmax(-1)
    taken = logp.exp()
    entropy = -torch.where(taken > 0, taken * logp.masked_fill(taken == 0, 0.0), 0.0).sum(-1)
    logprob = logp.gather(1, target[:, None]).squeeze(1)
    loss = logprob @ g.double()
    (gradient,) = torch.autograd.grad(loss if h is None else loss + entropy @ h.double(), leaf)
    return logprob.detach(), entropy.detach(), gradient


def shards(ranks: int, width: int, vocab_size: int) -> list[Shard]:
    return [Shard(rank * width, width, ranks, vocab_size) for rank in range(ranks)]


def forward(
    ranks: int, logits: Tensor, target: Tensor, inverse: Tensor, vocab_size: int, *, pieces: int = 1
) -> tuple[Merged, list[Tensor]]:
    """Each rank's statistics and what they merge to, without processes."""
    width = logits.shape[1] // ranks
    parts = []
    for shard in shards(ranks, width, vocab_size):
        block = logits[:, shard.start : shard.start + width].contiguous()
        part = empty_statistics(pieces, len(block), block.dtype, block.device, need_entropy=True).fill_(torch.nan)
        TRITON.statistics(block, shard.columns(target), inverse, valid=shard.valid, pieces=pieces, out=part)
        parts.append(part)
    return merge(torch.stack(parts), target, inverse, vocab_size, need_entropy=True), parts


def backward(
    ranks: int,
    logits: Tensor,
    target: Tensor,
    inverse: Tensor,
    merged: Merged,
    g: Tensor,
    h: Tensor | None,
    vocab_size: int,
) -> Tensor:
    """[T, V] gradient, each rank's written over its logits."""
    width = logits.shape[1] // ranks
    blocks = []
    for shard in shards(ranks, width, vocab_size):
        block = logits[:, shard.start : shard.start + width].clone()
        inputs = GradientInputs(shard.columns(target), inverse, merged, g, h)
        TRITON.gradient(block, inputs, valid=shard.valid, out=block)
        blocks.append(block)
    return torch.cat(blocks, 1)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [10400, 10397, 7001])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_match_float64(ranks: int, vocab_size: int, dtype: torch.dtype) -> None:
    """7001 of 10400: with four ranks padding begins in the third shard and fills the fourth."""
    logits, target = example(3, 10400, dtype=dtype)
    target = target % vocab_size
    inverse, g, h = incoming(3)
    merged, _ = forward(ranks, logits, target, inverse, vocab_size)
    logprob, entropy, _ = reference(logits, target, inverse, g, h, vocab_size)
    torch.testing.assert_close(merged.logprob.double(), logprob, rtol=1e-6, atol=5e-6)
    assert (merged.entropy.double() - entropy).abs().max() <= ENTROPY_LIMIT
    for slope in (None, h):
        gradient = backward(ranks, logits, target, inverse, merged, g, slope, vocab_size)
        exact = reference(logits, target, inverse, g, slope, vocab_size)[2]
        assert gradient.dtype == dtype
        assert bool((gradient[:, vocab_size:] == 0).all())
        if dtype == torch.float32:
            assert relative_error(gradient, exact) <= GRADIENT_LIMIT
        else:
            torch.testing.assert_close(gradient.double(), exact, rtol=BFLOAT16_LIMIT, atol=1e-7)


@pytest.mark.parametrize("offset", [1000.0, -1000.0, -90.0])
def test_an_offset_changes_nothing(offset: float) -> None:
    """-90: all logits lie where exp underflows, and a running maximum that starts at 0 would stay there."""
    logits, target = example(3, 6000)
    logits = (logits.clamp(max=1.0) * 1024).round() / 1024 + offset
    inverse, g, h = incoming(3)
    merged, _ = forward(2, logits, target, inverse, 6000)
    logprob, entropy, exact = reference(logits, target, inverse, g, h, 6000)
    torch.testing.assert_close(merged.logprob.double(), logprob, rtol=1e-6, atol=5e-6)
    assert (merged.entropy.double() - entropy).abs().max() <= ENTROPY_LIMIT
    assert relative_error(backward(2, logits, target, inverse, merged, g, h, 6000), exact) <= GRADIENT_LIMIT


def test_masked_columns_count_for_nothing_even_a_whole_shard() -> None:
    logits, target = example(4, 4 * 2600)
    logits[:, ::3] = -torch.inf
    logits[0, :2600] = -torch.inf
    logits[1, 2600:] = -torch.inf
    logits[2, 300:] = -torch.inf
    target = torch.tensor([2602, 1, 4, 7])
    inverse, g, h = incoming(4)
    merged, parts = forward(4, logits, target, inverse, 4 * 2600)
    assert parts[0][:3, 0].tolist() == [-torch.inf, 0.0, 0.0]
    logprob, entropy, exact = reference(logits, target, inverse, g, h, 4 * 2600)
    torch.testing.assert_close(merged.logprob.double(), logprob, rtol=1e-6, atol=5e-6)
    assert (merged.entropy.double() - entropy).abs().max() <= ENTROPY_LIMIT
    for slope in (h, None):
        _, _, exact = reference(logits, target, inverse, g, slope, 4 * 2600)
        gradient = backward(4, logits, target, inverse, merged, g, slope, 4 * 2600)
        assert bool((gradient[logits == -torch.inf] == 0).all())
        assert relative_error(gradient, exact.nan_to_num(0.0)) <= GRADIENT_LIMIT


def test_masked_target_and_row_masked_as_a_whole() -> None:
    logits, target = example(3, 1500)
    logits[0, target[0]] = -torch.inf
    logits[1] = -torch.inf
    merged, _ = forward(1, logits, target, torch.ones(3), 1500)
    assert merged.logprob[0] == -torch.inf
    assert merged.logprob.isnan().tolist() == [False, True, False]
    assert merged.entropy.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_logit_breaks_its_row_visibly(value: float) -> None:
    """The GPU's maximum of a number and NaN is the number: unguarded, a NaN counts as probability 0."""
    logits, target = example(3, 3000)
    logits[1, 1234] = value
    merged, _ = forward(1, logits, target, torch.ones(3), 3000)
    assert merged.logprob.isnan().tolist() == [False, True, False]
    assert merged.entropy.isnan().tolist() == [False, True, False]
    gradient = backward(1, logits, target, torch.ones(3), merged, torch.ones(3), torch.ones(3), 3000)
    assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "vocab_size"), [(8 * 1536, 8 * 1536), (8 * 501, 2301)])
def test_eighths_of_the_vocabulary_give_the_same_bits_over_ranks(
    columns: int, vocab_size: int, dtype: torch.dtype
) -> None:
    logits, target = example(2, columns, dtype=dtype)
    inverse, _, _ = incoming(2)
    one, _ = forward(1, logits, target % vocab_size, inverse, vocab_size, pieces=8)
    for ranks in (2, 4, 8):
        other, _ = forward(ranks, logits, target % vocab_size, inverse, vocab_size, pieces=8 // ranks)
        for name in ("logprob", "entropy", "maximum", "total"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    logits, target = example(12, 3000)
    inverse, _, _ = incoming(12)
    whole, _ = forward(1, logits, target, inverse, 3000)
    part, _ = forward(1, logits[6:8], target[6:8], inverse[6:8], 3000)
    assert torch.equal(whole.logprob[6:8], part.logprob)
    assert torch.equal(whole.entropy[6:8], part.entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 5, 1025, 5000])
@pytest.mark.parametrize("pieces", [1, 4])
def test_statistics_agree_with_eager(columns: int, pieces: int, dtype: torch.dtype) -> None:
    """Also pieces without a column, when there are fewer columns than pieces."""
    logits, target = example(2, columns, dtype=dtype)
    inverse, _, _ = incoming(2)
    column = torch.stack([target[0] % max(columns - 3, 1), torch.tensor(-1)])
    for need_entropy in (True, False):
        got, want = (
            empty_statistics(pieces, 2, dtype, logits.device, need_entropy=need_entropy).fill_(7) for _ in "ab"
        )
        for backend, out in ((TRITON, got), (EagerBackend(), want)):
            backend.statistics(logits, column, inverse, valid=max(columns - 3, 1), pieces=pieces, out=out)
        torch.testing.assert_close(got, want, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_agrees_with_eager_in_any_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    logits, target = example(5, 2600, dtype=dtype)
    inverse, g, h = incoming(5)
    merged, _ = forward(1, logits, target, inverse, 2500)
    column = Shard(0, 2600, 1, 2500).columns(target)
    got, want = (torch.full((5, 2600), 7.0, dtype=out_dtype) for _ in "ab")
    untouched = logits.clone()
    for backend, out in ((TRITON, got), (EagerBackend(), want)):
        backend.gradient(logits, GradientInputs(column, inverse, merged, g, h), valid=2500, out=out)
    assert torch.equal(logits, untouched)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: BFLOAT16_LIMIT, torch.float16: 2**-10}[out_dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-7)


def test_a_confident_token_is_rounded_once() -> None:
    """The target's two terms cancel nearly; rounded one by one in bfloat16 nothing would be left."""
    logits, _ = example(4, 1500, dtype=torch.bfloat16)
    target = torch.tensor([3, 900, 1400, 77])
    logits[range(4), target] = 24.0
    inverse, g, h = torch.ones(4), torch.ones(4), torch.full((4,), 0.1)
    merged, _ = forward(1, logits, target, inverse, 1500)
    gradient = backward(1, logits, target, inverse, merged, g, h, 1500)
    _, _, exact = reference(logits, target, inverse, g, h, 1500)
    own = range(4), target
    assert bool((exact[own].abs() < 0.01).all())
    torch.testing.assert_close(gradient[own].double(), exact[own], rtol=2 * BFLOAT16_LIMIT, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 1, 7])
def test_a_block_inside_a_wider_matrix(first: int, dtype: torch.dtype) -> None:
    """Rows further apart than the width, data that is not aligned: neighbours are neither read nor written."""
    logits, target = example(4, 1300, dtype=dtype)
    inverse, g, h = incoming(4)
    wide = torch.full((4, 1409), torch.nan, dtype=dtype)
    inside = wide[:, first : first + 1300]
    inside.copy_(logits)
    room = torch.full((5, 9), 7.0)
    out = room[:4, 2:6]
    TRITON.statistics(inside, target, inverse, valid=1300, pieces=1, out=out)
    merged, parts = forward(1, logits, target, inverse, 1300)
    assert torch.equal(out, parts[0])
    assert bool((room[4] == 7).all())
    assert bool((room[:, :2] == 7).all())
    assert bool((room[:, 6:] == 7).all())
    TRITON.gradient(inside, GradientInputs(target, inverse, merged, g, h), valid=1300, out=inside)
    assert torch.equal(inside, backward(1, logits, target, inverse, merged, g, h, 1300))
    assert bool(wide[:, :first].isnan().all())
    assert bool(wide[:, first + 1300 :].isnan().all())


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize(("width", "valid"), [(40, 40), (40, 0), (0, 0)])
def test_blocks_of_no_tokens_and_of_no_columns(tokens: int, width: int, valid: int) -> None:
    x = torch.full((tokens, width), torch.nan if valid == 0 else 1.0)
    column, ones = torch.full((tokens,), -1), torch.ones(tokens)
    out = torch.full((7, tokens), 7.0)
    TRITON.statistics(x, column, ones, valid=valid, pieces=2, out=out)
    if valid == 0:
        assert out.T.tolist() == [[-torch.inf, 0, 0, -torch.inf, 0, 0, 0]] * tokens
    TRITON.gradient(x, GradientInputs(column, ones, Merged(*[ones] * 4), ones, ones), valid=valid, out=x)
    assert bool((x[:, valid:] == 0).all())
    assert bool(x.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_autograd_the_gradient_takes_the_place_of_the_logits(dtype: torch.dtype) -> None:
    """The gradient that arrives from a sum is one number with stride 0."""
    logits, target = example(5, 1300, dtype=dtype)
    base = logits.clone().requires_grad_()
    computed = base * 1.0
    version = computed._version
    seen: list[Tensor] = []
    computed.register_hook(seen.append)
    logprob, entropy = logprob_and_entropy(
        computed, target, temperature=0.7, vocab_size=1299, entropy_gradient=True, backend="triton"
    )
    (logprob.sum() + entropy.sum()).backward(retain_graph=True)
    assert seen[0].data_ptr() == computed.data_ptr()
    assert computed._version > version
    ones = torch.ones(5)
    want = reference(logits, target, ones / 0.7, ones, ones, 1299)
    torch.testing.assert_close(logprob.detach().double(), want[0], rtol=1e-6, atol=5e-6)
    assert (entropy.detach().double() - want[1]).abs().max() <= ENTROPY_LIMIT
    limit = 1e-5 if dtype == torch.float32 else BFLOAT16_LIMIT
    torch.testing.assert_close(base.grad.double(), want[2], rtol=limit, atol=3e-7)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.sum().backward()


def test_another_user_of_overwritten_logits_is_an_error() -> None:
    """A kernel writes behind autograd's back, which must be told."""
    logits, target = example(4, 40)
    computed = (logits * 0.1).requires_grad_().exp()
    logprob, _ = logprob_and_entropy(computed, target, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.sum().backward()


def test_no_tokens_through_autograd() -> None:
    logits = torch.zeros(0, 40, requires_grad=True)
    logprob, _ = logprob_and_entropy(logits * 1.0, torch.zeros(0, dtype=torch.int64), backend="triton")
    logprob.sum().backward()
    assert logits.grad.shape == (0, 40)


def test_auto_on_a_cpu_stays_eager_even_with_the_interpreter() -> None:
    logits, target = example(2, 40)
    auto, eager = (logprob_and_entropy(logits.double(), target, backend=name)[0] for name in ("auto", "eager"))
    assert torch.equal(auto, eager)


def test_what_the_kernels_would_get_wrong_is_refused() -> None:
    logits, target = example(4, 40)
    with pytest.raises(ValueError, match=r"takes no torch\.float64 logits; use backend='eager'"):
        logprob_and_entropy(logits.double(), target, backend="triton")
    with pytest.raises(ValueError, match="needs logits with unit stride along the vocabulary"):
        logprob_and_entropy(logits.T, torch.zeros(40, dtype=torch.int64), backend="triton")
    ones = torch.ones(4)
    inputs = GradientInputs(target, ones, Merged(ones, ones, ones, None), ones, None)
    with pytest.raises(ValueError, match="rows overlap"):
        TRITON.gradient(logits, inputs, valid=40, out=torch.zeros(40).expand(4, 40))
    with pytest.raises(ValueError, match=r"takes no torch\.float64 gradient"):
        TRITON.gradient(logits, inputs, valid=40, out=logits.double())
