"""Log-probability and entropy against float64, on one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_entropic.tensor_parallel import logprob_and_entropy


def reference(
    logits: Tensor, target: Tensor, temperature: float | Tensor = 1.0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The textbook formula in float64; columns with probability 0 contribute nothing to the entropy."""
    z = logits.double()[:, :vocab_size]
    z = z / (temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature)
    logp = z.log_softmax(-1)
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)
    return logp.gather(1, target[:, None]).squeeze(1), entropy


def example(tokens: int, columns: int, *, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, columns, generator=generator) * scale
    return logits, torch.randint(columns, (tokens,), generator=generator)


def reference_gradient(
    logits: Tensor, target: Tensor, g: Tensor, h: Tensor, temperature: float | Tensor, vocab_size: int | None = None
) -> Tensor:
    leaf = logits.double().requires_grad_()
    logprob, entropy = reference(leaf, target, temperature, vocab_size)
    (logprob @ g.double() + entropy @ h.double()).backward()
    assert leaf.grad is not None
    return leaf.grad


class LargestAllocation(TorchDispatchMode):
    """Largest storage that any operation returned, other than the given tensor's own."""

    def __init__(self, own: Tensor) -> None:
        super().__init__()
        self.own = own.untyped_storage().data_ptr()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor) and item.untyped_storage().data_ptr() != self.own:
                self.nbytes = max(self.nbytes, item.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("columns", [1, 5, 8, 97, 1408, 32000])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_values_match_float64(columns: int, temperature: float) -> None:
    logits, target = example(37, columns)
    logprob, entropy = logprob_and_entropy(logits, target, temperature=temperature)
    want_logprob, want_entropy = reference(logits, target, temperature)
    assert logprob.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprob.double(), want_logprob, rtol=3e-7, atol=3e-6)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=0, atol=3e-6)


def test_entropy_at_a_temperature_is_that_of_the_scaled_softmax() -> None:
    """Unscaled logits would be off by far more than the tolerance: a trap others fell into."""
    logits, target = example(16, 500)
    _, entropy = logprob_and_entropy(logits, target, temperature=0.6)
    torch.testing.assert_close(entropy.double(), reference(logits / 0.6, target)[1], rtol=0, atol=3e-6)
    assert (entropy.double() - reference(logits, target)[1]).abs().min() > 0.1


def test_entropy_is_exact_for_a_large_vocabulary_and_any_offset() -> None:
    """`logsumexp - sum(p z)` in float32 is off by 1e-4 to 1e-3 nats here."""
    logits, target = example(12, 151936, scale=2.5)
    logits = (logits * 1024).round() / 1024
    for offset in (0.0, 1000.0, -1000.0):
        moved = logits + offset
        logprob, entropy = logprob_and_entropy(moved, target)
        want_logprob, want_entropy = reference(moved, target)
        assert (entropy.double() - want_entropy).abs().max() <= 5e-6
        assert (logprob.double() - want_logprob).abs().max() <= 5e-6


def test_logits_all_far_below_zero() -> None:
    """A running maximum that starts at 0 gives inf below -88."""
    logits, target = example(8, 300)
    logprob, entropy = logprob_and_entropy(logits - 5e3, target)
    want = reference(logits - 5e3, target)
    torch.testing.assert_close(logprob.double(), want[0], rtol=0, atol=5e-6)
    torch.testing.assert_close(entropy.double(), want[1], rtol=0, atol=5e-6)


@given(
    tokens=st.integers(1, 9),
    columns=st.integers(1, 70),
    padding=st.integers(0, 40),
    temperature=st.floats(0.2, 3.0),
    scale=st.floats(0.0, 30.0),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_temperature_and_padding(
    tokens: int, columns: int, padding: int, temperature: float, scale: float, seed: int
) -> None:
    logits, target = example(tokens, columns + padding, scale=scale, seed=seed)
    target = target % columns
    leaf = logits.clone().requires_grad_()
    logprob, entropy = logprob_and_entropy(
        leaf, target, temperature=temperature, vocab_size=columns, entropy_gradient=True
    )
    want_logprob, want_entropy = reference(logits, target, temperature, columns)
    torch.testing.assert_close(logprob.detach().double(), want_logprob, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(entropy.detach().double(), want_entropy, rtol=1e-6, atol=5e-6)
    assert bool((entropy >= -1e-6).all())
    assert bool((entropy <= math.log(columns) + 1e-5).all())
    g, h = torch.linspace(-1, 2, tokens), torch.linspace(1, -3, tokens)
    (logprob @ g + entropy @ h).backward()
    want = reference_gradient(logits, target, g, h, temperature, columns)
    torch.testing.assert_close(leaf.grad.double(), want, rtol=2e-5, atol=2e-5)


def test_temperature_per_token() -> None:
    logits, target = example(6, 50)
    temperature = torch.tensor([0.3, 0.6, 1.0, 1.3, 2.0, 5.0])
    leaf = logits.clone().requires_grad_()
    logprob, entropy = logprob_and_entropy(leaf, target, temperature=temperature, entropy_gradient=True)
    want = reference(logits, target, temperature)
    torch.testing.assert_close(logprob.detach().double(), want[0], rtol=0, atol=5e-6)
    torch.testing.assert_close(entropy.detach().double(), want[1], rtol=0, atol=5e-6)
    g, h = torch.ones(6), torch.linspace(-1, 1, 6)
    (logprob @ g + entropy @ h).backward()
    torch.testing.assert_close(
        leaf.grad.double(), reference_gradient(logits, target, g, h, temperature), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_gradcheck(entropy_gradient: bool) -> None:
    logits, target = example(5, 23, scale=1.5)
    temperature = torch.tensor([0.5, 0.7, 1.0, 1.4, 2.0], dtype=torch.float64)
    leaf = logits.double().requires_grad_()

    def call(x: Tensor) -> tuple[Tensor | None, ...]:
        result = logprob_and_entropy(
            x * 1.0, target, temperature=temperature, vocab_size=23, entropy_gradient=entropy_gradient, in_place=False
        )
        return result if entropy_gradient else result[:1]

    assert torch.autograd.gradcheck(call, (leaf,), check_undefined_grad=False)


def test_only_the_entropy_is_used() -> None:
    logits, target = example(4, 30)
    leaf = logits.clone().requires_grad_()
    _, entropy = logprob_and_entropy(leaf, target, entropy_gradient=True)
    entropy.sum().backward()
    want = reference_gradient(logits, target, torch.zeros(4), torch.ones(4), 1.0)
    torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-5, atol=1e-6)


def test_bfloat16_logits() -> None:
    """Values are those of the rounded logits in float32; the gradient is rounded once, at the very end."""
    logits, target = example(40, 4000)
    rounded = logits.bfloat16()
    target[:8] = rounded[:8].argmax(-1)
    rounded[range(8), target[:8]] += 30
    leaf = rounded.clone().requires_grad_()
    logprob, entropy = logprob_and_entropy(leaf, target, temperature=0.8, entropy_gradient=True)
    want = reference(rounded, target, 0.8)
    assert logprob.dtype == torch.float32
    torch.testing.assert_close(logprob.detach().double(), want[0], rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(entropy.detach().double(), want[1], rtol=1e-6, atol=5e-6)
    g, h = torch.linspace(-2, 2, 40), torch.linspace(1, -1, 40)
    (logprob @ g + entropy @ h).backward()
    exact = reference_gradient(rounded, target, g, h, 0.8)
    assert leaf.grad.dtype == torch.bfloat16
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=2**-8, atol=3e-7)


def test_masked_columns() -> None:
    """-inf logits have probability 0, not NaN; a masked target has log-probability -inf; their gradient is 0."""
    logits, target = example(6, 64)
    logits[:, ::3] = -torch.inf
    logits[2, 8:16] = -torch.inf  # a whole piece of the vocabulary
    target[:] = 1
    target[5] = 3
    leaf = logits.clone().requires_grad_()
    logprob, entropy = logprob_and_entropy(leaf, target, entropy_gradient=True, temperature=0.7)
    want = reference(logits, target, 0.7)
    torch.testing.assert_close(logprob.detach().double(), want[0], rtol=0, atol=5e-6)
    torch.testing.assert_close(entropy.detach().double(), want[1], rtol=0, atol=5e-6)
    assert logprob[5] == -torch.inf
    (logprob[:5].sum() + entropy.sum()).backward()
    assert bool(torch.isfinite(leaf.grad).all())
    assert bool((leaf.grad[logits == -torch.inf] == 0).all())


def test_padded_columns_do_not_exist() -> None:
    """Padding weighs like a logit of 0 unless masked, and must get no gradient, not even a stale logit."""
    logits, target = example(9, 1408)
    target = target % 1300
    base = logits.clone().requires_grad_()
    logprob, entropy = logprob_and_entropy(base * 1.0, target, vocab_size=1300, entropy_gradient=True)
    want = reference(logits[:, :1300], target)
    torch.testing.assert_close(logprob.detach().double(), want[0], rtol=0, atol=5e-6)
    torch.testing.assert_close(entropy.detach().double(), want[1], rtol=0, atol=5e-6)
    (logprob.sum() + entropy.sum()).backward()
    assert bool((base.grad[:, 1300:] == 0).all())


def test_forward_leaves_float32_logits_alone() -> None:
    """`.float()` of float32 is no copy: an in-place operation after it would destroy the caller's tensor."""
    logits, target = example(7, 90)
    leaf = logits.clone().requires_grad_()
    with torch.no_grad():
        logprob_and_entropy(leaf, target, temperature=0.5)
    logprob, _ = logprob_and_entropy(leaf, target, temperature=0.5, in_place=True)
    assert torch.equal(leaf, logits)
    logprob.sum().backward()
    logprob_and_entropy(leaf[:, :80], target % 80)[0].sum().backward()
    assert torch.equal(leaf, logits), "a leaf belongs to the caller, and so does what a view of it shows"
    hidden = logits.clone().requires_grad_()
    computed = hidden * 1.0
    logprob_and_entropy(computed, target, in_place=False)[0].sum().backward()
    assert torch.equal(computed, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_takes_the_place_of_the_logits(dtype: torch.dtype) -> None:
    logits, target = example(10, 200)
    base = logits.to(dtype).requires_grad_()
    computed = base * 1.0
    version = computed._version
    seen: list[Tensor] = []
    computed.register_hook(seen.append)
    logprob, _ = logprob_and_entropy(computed, target)
    logprob.sum().backward()
    assert seen[0].data_ptr() == computed.data_ptr()
    assert computed._version > version, "autograd must be able to see that the logits are gone"
    exact = reference_gradient(base.detach(), target, torch.ones(10), torch.zeros(10), 1.0)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(base.grad.double(), exact, rtol=tolerance, atol=1e-6)


def test_second_backward_in_place_is_refused() -> None:
    logits, target = example(4, 40)
    computed = logits.requires_grad_() * 1.0
    logprob, _ = logprob_and_entropy(computed, target)
    logprob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.sum().backward()


def test_second_backward_out_of_place_is_right() -> None:
    logits, target = example(4, 40)
    base = logits.clone().requires_grad_()
    logprob, _ = logprob_and_entropy(base * 1.0, target, in_place=False)
    logprob.sum().backward(retain_graph=True)
    once = base.grad.clone()
    logprob.sum().backward()
    torch.testing.assert_close(base.grad, 2 * once)


def test_another_user_of_overwritten_logits_is_an_error() -> None:
    """`exp` needs its result in its own backward pass, which runs after ours: never a silently wrong gradient."""
    logits, target = example(4, 40, scale=1.0)
    computed = logits.requires_grad_().exp()
    logprob, _ = logprob_and_entropy(computed, target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.sum().backward()


def test_double_backward_is_refused() -> None:
    logits, target = example(4, 40)
    leaf = logits.requires_grad_()
    logprob, _ = logprob_and_entropy(leaf, target)
    with pytest.raises(RuntimeError, match="differentiating the gradient"):
        torch.autograd.grad(logprob.sum(), leaf, create_graph=True)


def test_entropy_without_gradient_by_default() -> None:
    logits, target = example(4, 40)
    logprob, entropy = logprob_and_entropy(logits.requires_grad_(), target)
    assert logprob.requires_grad
    assert not entropy.requires_grad


def saved_for_backward(logits: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprob_and_entropy(logits, target, **options)
    return saved


def test_saves_the_logits_and_nothing_else_of_their_size() -> None:
    logits, target = example(30, 5000)
    leaf = logits.requires_grad_()
    saved = saved_for_backward(leaf, target, entropy_gradient=True)
    large = [t for t in saved if t.numel() > 30]
    assert [t.data_ptr() for t in large] == [leaf.data_ptr()]


def test_saves_nothing_when_no_gradient_is_needed() -> None:
    logits, target = example(30, 500)
    assert saved_for_backward(logits, target) == []
    with torch.no_grad():
        assert saved_for_backward(logits.requires_grad_(), target) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory_is_a_small_part_of_the_logits(dtype: torch.dtype) -> None:
    logits, target = example(1024, 16384)
    base = torch.zeros((), dtype=dtype, requires_grad=True)
    computed = logits.to(dtype) + base
    with LargestAllocation(computed) as largest:
        logprob, entropy = logprob_and_entropy(computed, target, entropy_gradient=True)
        torch.autograd.grad(logprob.sum() + entropy.sum(), computed)
    assert 0 < largest.nbytes <= 0.1 * 4 * logits.numel()


def test_no_tokens() -> None:
    logits = torch.zeros(0, 40, requires_grad=True)
    logprob, entropy = logprob_and_entropy(logits * 1.0, torch.zeros(0, dtype=torch.int64), temperature=0.6)
    assert logprob.shape == entropy.shape == (0,)
    logprob.sum().backward()
    assert logits.grad.shape == (0, 40)


def test_without_entropy() -> None:
    logits, target = example(5, 70)
    logprob, entropy = logprob_and_entropy(logits, target, need_entropy=False, temperature=0.9)
    assert entropy is None
    assert torch.equal(logprob, logprob_and_entropy(logits, target, temperature=0.9)[0])
    leaf = logits.clone().requires_grad_()
    logprob_and_entropy(leaf, target, need_entropy=False, temperature=0.9)[0].sum().backward()
    exact = reference_gradient(logits, target, torch.ones(5), torch.zeros(5), 0.9)
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-5, atol=1e-6)


def test_rows_that_have_no_answer_are_nan() -> None:
    """A target that no rank owns, a row masked as a whole: NaN, not a number that looks plausible."""
    logits, _ = example(4, 40)
    logits[3] = -torch.inf
    logprob, entropy = logprob_and_entropy(logits, torch.tensor([3, 35, -1, 0]), vocab_size=30)
    assert logprob.isnan().tolist() == [False, True, True, True]
    assert entropy.isnan().tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": torch.ones(3)}, "temperature must be a number or"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "target must be int64"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, "target must be int64"),
        ({"logits": torch.zeros(4, 2, 8)}, "logits must be floating point"),
        ({"vocab_size": 9}, "vocab_size 9 does not fit"),
        ({"entropy_gradient": True, "need_entropy": False}, "needs need_entropy"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: dict[str, Any], message: str) -> None:
    settings_ = {"logits": torch.zeros(4, 8), "target": torch.zeros(4, dtype=torch.int64), **arguments}
    with pytest.raises(ValueError, match=message):
        logprob_and_entropy(settings_.pop("logits"), settings_.pop("target"), **settings_)
