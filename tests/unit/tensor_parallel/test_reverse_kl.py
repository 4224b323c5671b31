"""Reverse KL of a policy from a teacher on one rank, against float64 autograd through stored logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_entropic.tensor_parallel import fused_reverse_kl

TOKENS, HIDDEN, TEACHER_HIDDEN, WIDTH, VOCAB = 37, 24, 40, 112, 101


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    temperature: Tensor
    coefficients: Tensor
    """[T] dL/dKL."""


def case(dtype: torch.dtype = torch.float32, scale: float = 0.4) -> Case:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Case(
        hidden=(normal(TOKENS, HIDDEN) * scale).to(dtype),
        weight=normal(WIDTH, HIDDEN).to(dtype),
        teacher_hidden=(normal(TOKENS, TEACHER_HIDDEN) * scale).to(dtype),
        teacher_weight=normal(WIDTH, TEACHER_HIDDEN).to(dtype),
        temperature=0.5 + torch.rand(TOKENS, generator=generator),
        coefficients=normal(TOKENS),
    )


def reference(data: Case, teacher_temperature: Tensor | float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(KL [T], dL/dhidden, dL/dweight) in float64."""
    hidden, weight = (value.double().detach().requires_grad_() for value in (data.hidden, data.weight))
    cooled = data.temperature if teacher_temperature is None else torch.as_tensor(teacher_temperature).expand(TOKENS)
    logp = ((hidden @ weight.T)[:, :VOCAB] / data.temperature.double()[:, None]).log_softmax(-1)
    logits = data.teacher_hidden.double() @ data.teacher_weight.double().T
    logq = (logits[:, :VOCAB] / cooled.double()[:, None]).log_softmax(-1)
    divergence = (logp.exp() * (logp - logq)).sum(-1)
    (divergence @ data.coefficients.double()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return divergence.detach(), hidden.grad, weight.grad


def fused(data: Case, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (value.clone().requires_grad_() for value in (data.hidden, data.weight))
    divergence = fused_reverse_kl(
        hidden,
        weight,
        data.teacher_hidden,
        data.teacher_weight,
        temperature=data.temperature,
        vocab_size=VOCAB,
        **options,
    )
    (divergence @ data.coefficients.to(divergence.dtype)).backward()
    return divergence.detach(), hidden.grad, weight.grad


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], limit: float) -> None:
    for have, expected in zip(got, want, strict=True):
        assert (have.double() - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize(("token_chunk", "vocab_chunk"), [(None, None), (5, 16), (1, 7), (64, 40), (37, 101)])
def test_parity_for_every_chunking(token_chunk: int | None, vocab_chunk: int | None) -> None:
    data = case()
    assert_close(fused(data, token_chunk=token_chunk, vocab_chunk=vocab_chunk), reference(data), 2e-6)


def test_float64_stays() -> None:
    data = case(torch.float64)
    assert_close(fused(data, token_chunk=8, vocab_chunk=30), reference(data), 1e-12)


def test_low_precision_inputs_give_float32_values() -> None:
    data = case(torch.bfloat16)
    got, want = fused(data, token_chunk=5, vocab_chunk=16), reference(data)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == got[2].dtype == torch.bfloat16
    assert_close(got[:1], want[:1], 1e-5)
    assert_close(got, want, 4e-3)


def test_a_teacher_at_another_temperature() -> None:
    data = case()
    assert_close(fused(data, teacher_temperature=1.3), reference(data, 1.3), 2e-6)


def test_the_policy_as_its_own_teacher_has_nothing_to_learn() -> None:
    data = case()
    data.teacher_hidden, data.teacher_weight = data.hidden, data.weight
    divergence, dhidden, dweight = fused(data, vocab_chunk=16)
    assert divergence.abs().max() < 1e-6
    assert max(dhidden.abs().max(), dweight.abs().max()) < 1e-5


def test_a_common_offset_of_logits_costs_no_digits() -> None:
    """As biases of hidden states make it: centred on the maximum before anything is scaled."""
    data = case()
    plain = fused(data)[0]
    for name in ("hidden", "teacher_hidden"):
        setattr(data, name, torch.cat([getattr(data, name), torch.full((TOKENS, 1), 100.0)], 1))
    for name in ("weight", "teacher_weight"):
        setattr(data, name, torch.cat([getattr(data, name), torch.full((WIDTH, 1), 10.0)], 1))
    # Rounding of the logits themselves, 1000 +- 3e-5, is all there is.
    assert (fused(data)[0] - plain).abs().max() < 2e-3


def test_tokens_that_are_far_apart_stay_finite() -> None:
    data = case(scale=200.0)
    assert all(value.isfinite().all() for value in fused(data, vocab_chunk=16))


def test_rows_and_no_rows() -> None:
    data = case()
    rows = torch.tensor([30, 2, 17])
    shared: dict[str, Any] = {"vocab_size": VOCAB, "temperature": data.temperature[rows]}
    got = fused_reverse_kl(
        data.hidden, data.weight, data.teacher_hidden[rows], data.teacher_weight, rows=rows, **shared
    )
    torch.testing.assert_close(got.double(), reference(data)[0][rows], rtol=1e-5, atol=1e-6)
    hidden = data.hidden.clone().requires_grad_()
    nothing = torch.zeros(0, dtype=torch.int64)
    none = fused_reverse_kl(hidden, data.weight, data.teacher_hidden[:0], data.teacher_weight, rows=nothing)
    none.sum().backward()
    assert none.shape == (0,)
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_weight_gradient_goes_into_megatrons_buffer() -> None:
    data = case()
    hidden, weight = (value.clone().requires_grad_() for value in (data.hidden, data.weight))
    main_grad = torch.full((WIDTH, HIDDEN), 2.0)
    divergence = fused_reverse_kl(
        hidden,
        weight,
        data.teacher_hidden,
        data.teacher_weight,
        temperature=data.temperature,
        vocab_size=VOCAB,
        main_grad=main_grad,
    )
    (divergence @ data.coefficients).backward()
    assert_close((main_grad - 2.0,), (reference(data)[2],), 2e-5)
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_shapes_that_do_not_go_together_are_refused() -> None:
    data = case()
    with pytest.raises(ValueError, match=r"teacher_weight must be \[112, H'\]"):
        fused_reverse_kl(data.hidden, data.weight, data.teacher_hidden, data.teacher_weight[:90])
    with pytest.raises(ValueError, match=r"the teacher must be torch\.float32"):
        fused_reverse_kl(data.hidden, data.weight, data.teacher_hidden.double(), data.teacher_weight.double())
