"""What a bfloat16 policy runs on a CPU instead of torch's or megatron-core's own, against float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_entropic.policy.megatron.rotary import apply_rotary_packed
from megatron_entropic.policy.megatron.wide_linear import wide_linear
from megatron_entropic.policy.model.attention import attention
from megatron_entropic.policy.model.norm import RMSNorm

BFLOAT16 = torch.bfloat16


def values_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradient of each input for one fixed gradient of the result."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    result = function(*leaves)
    generator = torch.Generator().manual_seed(5)
    incoming = torch.randn(result.shape, generator=generator, dtype=torch.float64).bfloat16().to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, incoming)]


def errors(function: Callable[..., Tensor], exact: Callable[..., Tensor], *inputs: Tensor) -> list[float]:
    """Largest error of the result and of each gradient, relative to the largest value in float64."""
    got = values_and_gradients(function, *inputs)
    want = values_and_gradients(exact, *(value.double() for value in inputs))
    assert [value.dtype for value in got] == [BFLOAT16] * len(got)
    return [
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(got, want, strict=True)
    ]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def norm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """RMSNorm of 64 numbers as a function of input and weight."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    layer = RMSNorm(SimpleNamespace(params_dtype=BFLOAT16, sequence_parallel=False), 64, eps=1e-5)

    return lambda x, weight: torch.func.functional_call(layer, {"weight": weight}, (x,))


@pytest.mark.parametrize("rows", [(1,), (5000, 1), (300, 3)])
def test_norm(norm: Callable[..., Tensor], rows: tuple[int, ...]) -> None:
    x, weight = random(*rows, 64), 1 + 0.1 * random(64, seed=1)

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (64,), weight, 1e-5)

    assert max(errors(norm, exact, x, weight)) <= 2**-8


def test_norm_of_heads_that_are_a_view(norm: Callable[..., Tensor]) -> None:
    packed, weight = random(40, 5, 96), 1 + 0.1 * random(64, seed=1)
    heads = packed[:, 1:4, 16:80]
    assert not heads.is_contiguous()
    assert torch.equal(norm(heads, weight), norm(heads.contiguous(), weight))


def test_norm_of_no_rows(norm: Callable[..., Tensor]) -> None:
    empty = torch.empty(0, 64, dtype=BFLOAT16)
    result, dx, dweight = values_and_gradients(norm, empty, random(64))
    assert result.shape == dx.shape == (0, 64)
    assert not dweight.any()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_gradients_are_those_of_float32(masked: bool) -> None:
    """torch's own backward pass in bfloat16 is wrong by 8e-3 and more here."""
    q, k, v = random(2, 4, 100, 16), random(2, 2, 100, 16, seed=1), random(2, 2, 100, 16, seed=2)
    mask = torch.ones(100, 100, dtype=torch.bool).tril().expand(2, 1, -1, -1)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True)

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask if masked else None, 0.25)

    assert max(errors(own, exact, q, k, v)) <= 2**-8


def test_rotation_and_its_way_back() -> None:
    """The bfloat16 cosines and sines are off by 2**-9."""
    angles = torch.outer(torch.arange(20.0), 1 / 100 ** (torch.arange(8) / 8)).repeat(1, 2)[:, None, None]
    one_rank = SimpleNamespace(rank=lambda: 0, size=lambda: 1)

    def rotate(x: Tensor) -> Tensor:
        return apply_rotary_packed(x, torch.tensor([0, 20, 35], dtype=torch.int32), angles, cp_group=one_rank)

    heads = random(35, 3, 24)[..., :16]
    assert max(errors(rotate, rotate, heads)) <= 2**-7


def linear(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    parallel: dict[str, Any] = {"allreduce_dgrad": False, "sequence_parallel": False, "tp_group": None}
    return wide_linear(x, weight, **{"bias": None, **parallel, **options})


def test_what_follows_a_wide_layer_may_write_into_its_output() -> None:
    """megatron-core's cross-entropy takes the maximum off the logits in place: `update_overhead` ended in an error."""
    x, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    linear(x, weight).mul_(2.0).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2.0 * weight.detach().sum(0).expand(2, 3, 4))


def test_linear_rounds_once() -> None:
    x, weight = random(50, 1, 300), random(70, 300, seed=1)
    assert max(errors(linear, lambda x, weight: x @ weight.t(), x, weight)) <= 2**-8


def test_linear_of_float32_has_the_bits_of_megatron_core() -> None:
    x, weight = random(50, 1, 300).float(), random(70, 300, seed=1).float()

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return torch.matmul(x, weight.t())

    own, theirs = values_and_gradients(linear, x, weight), values_and_gradients(plain, x, weight)
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))


def test_linear_of_a_frozen_weight() -> None:
    x, weight = random(6, 20).requires_grad_(), random(8, 20, seed=1)
    linear(x, weight, bias=random(8)).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
