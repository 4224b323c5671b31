"""The two fused heads on one rank against float64 autograd through stored logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_entropic.tensor_parallel import fused_logprob_and_entropy, fused_policy_loss, products

TOKENS, HIDDEN, WIDTH, VOCAB = 37, 24, 112, 101


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    target: Tensor
    temperature: Tensor
    coefficients: Tensor
    """[2, T] of log-probability and of entropy in the loss."""


def case(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> Case:
    generator = torch.Generator().manual_seed(11)
    return Case(
        hidden=torch.randn(tokens, HIDDEN, generator=generator).to(dtype),
        weight=torch.randn(WIDTH, HIDDEN, generator=generator).to(dtype),
        target=torch.randint(VOCAB, (tokens,), generator=generator),
        temperature=0.5 + torch.rand(tokens, generator=generator),
        coefficients=torch.randn(2, tokens, generator=generator),
    )


@dataclass
class Result:
    logprob: Tensor
    entropy: Tensor
    dhidden: Tensor
    dweight: Tensor


def reference(data: Case, keep: Tensor | None = None, entropic: float = 1.0) -> Result:
    """float64 autograd; only the tokens of `keep` [T] count, the others have value 0."""
    hidden, weight = (value.double().detach().requires_grad_() for value in (data.hidden, data.weight))
    logits = (hidden @ weight.T)[:, :VOCAB] / data.temperature.double()[:, None]
    logp = logits.log_softmax(-1)
    keep = torch.ones(len(hidden), dtype=torch.bool) if keep is None else keep
    logprob = logp.gather(1, data.target[:, None]).squeeze(1) * keep
    entropy = -(logp.exp() * logp).sum(-1) * keep
    g, h = data.coefficients.double()
    (logprob @ g + entropic * (entropy @ h)).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Result(logprob.detach(), entropy.detach(), hidden.grad, weight.grad)


def recompute(data: Case, **options: Any) -> Result:
    hidden, weight = (value.clone().requires_grad_() for value in (data.hidden, data.weight))
    logprob, entropy = fused_logprob_and_entropy(
        hidden, weight, data.target, temperature=data.temperature, vocab_size=VOCAB, entropy_gradient=True, **options
    )
    (logprob @ data.coefficients[0] + entropy @ data.coefficients[1]).backward()
    return Result(logprob.detach(), entropy.detach(), hidden.grad, weight.grad)


def gradient_in_forward(data: Case, keep: Tensor | None = None, **options: Any) -> Result:
    hidden, weight = (value.clone().requires_grad_() for value in (data.hidden, data.weight))
    coefficients = data.coefficients if keep is None else data.coefficients[:, keep]

    def token_loss(logprob: Tensor, entropy: Tensor | None, tokens: slice) -> Tensor:
        assert entropy is not None
        return logprob @ coefficients[0, tokens] + entropy @ coefficients[1, tokens]

    if keep is not None:
        options["loss_mask"] = keep
    loss, logprob, entropy = fused_policy_loss(
        hidden, weight, data.target, token_loss, temperature=data.temperature, vocab_size=VOCAB, **options
    )
    assert not logprob.requires_grad
    (3.0 * loss).backward()
    return Result(logprob, entropy, hidden.grad / 3.0, weight.grad / 3.0)


def assert_close(got: Result, want: Result, limit: float = 1e-5) -> None:
    assert (got.logprob - want.logprob).abs().max() <= limit * want.logprob.abs().max()
    assert (got.entropy - want.entropy).abs().max() <= max(limit, 5e-6)
    for name in ("dhidden", "dweight"):
        error = getattr(got, name) - getattr(want, name)
        assert error.norm() <= limit * getattr(want, name).norm(), name


@pytest.mark.parametrize("head", [recompute, gradient_in_forward])
@pytest.mark.parametrize(("token_chunk", "vocab_chunk"), [(None, None), (5, 16), (1, 7), (64, 40), (37, 101)])
def test_parity_for_every_chunking(
    head: Callable[..., Result], token_chunk: int | None, vocab_chunk: int | None
) -> None:
    data = case()
    assert_close(head(data, token_chunk=token_chunk, vocab_chunk=vocab_chunk), reference(data))


@pytest.mark.parametrize("head", [recompute, gradient_in_forward])
def test_low_precision_inputs_give_float32_values(head: Callable[..., Result]) -> None:
    """Values are exact for the bfloat16 inputs: the logits in between are not rounded. Gradients are, once."""
    data = case(torch.bfloat16)
    got, want = head(data, token_chunk=5, vocab_chunk=16), reference(data)
    assert got.logprob.dtype == torch.float32
    assert got.dhidden.dtype == got.dweight.dtype == torch.bfloat16
    assert (got.logprob - want.logprob).abs().max() <= 1e-5 * want.logprob.abs().max()
    assert (got.entropy - want.entropy).abs().max() <= 5e-6
    assert (got.dhidden - want.dhidden).norm() <= 3e-3 * want.dhidden.norm()
    assert (got.dweight - want.dweight).norm() <= 3e-3 * want.dweight.norm()


@pytest.mark.parametrize("head", [recompute, gradient_in_forward])
def test_low_precision_tiles_keep_float32_values(head: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with AMX: what is rounded are gradients of logits, and only while the head multiplies."""
    monkeypatch.setattr(products, "has_bfloat16_tiles", lambda: True)
    data = case(torch.bfloat16)
    got, want = head(data), reference(data)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    assert (got.logprob - want.logprob).abs().max() <= 1e-5 * want.logprob.abs().max()
    assert (got.entropy - want.entropy).abs().max() <= 5e-6
    assert (got.dhidden - want.dhidden).norm() <= 5e-3 * want.dhidden.norm()
    assert (got.dweight - want.dweight).norm() <= 5e-3 * want.dweight.norm()


def test_low_precision_tiles_are_for_bfloat16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_bfloat16_tiles", lambda: True)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        with products.low_precision_tiles(torch.zeros(1, dtype=dtype)):
            found.append(torch.backends.mkldnn.matmul.fp32_precision)
    assert found == ["none", "bf16"]


@pytest.mark.parametrize("head", [recompute, gradient_in_forward])
def test_float64_stays(head: Callable[..., Result]) -> None:
    data = case(torch.float64)
    data.temperature, data.coefficients = data.temperature.double(), data.coefficients.double()
    assert_close(head(data, token_chunk=8, vocab_chunk=30), reference(data), limit=1e-12)


@pytest.mark.parametrize("kept", [0, 1, 20, TOKENS])
def test_masked_tokens_count_for_nothing(kept: int) -> None:
    data = case()
    keep = torch.zeros(TOKENS, dtype=torch.bool)
    keep[torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))[:kept]] = True
    want = reference(data, keep)
    for got in (recompute(data, loss_mask=keep, token_chunk=6), gradient_in_forward(data, keep, token_chunk=6)):
        assert torch.equal(got.logprob[~keep], torch.zeros(TOKENS - kept))
        assert torch.equal(got.entropy[~keep], torch.zeros(TOKENS - kept))
        assert torch.equal(got.dhidden[~keep], torch.zeros(TOKENS - kept, HIDDEN))
        if kept:
            assert_close(got, want)
        else:
            assert not got.dweight.any()


def test_masked_tokens_enter_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    data = case()
    keep = torch.arange(TOKENS) < 9
    data.hidden[9:] = torch.nan
    for got in (recompute(data, loss_mask=keep), gradient_in_forward(data, keep)):
        assert got.dweight.isfinite().all()
        assert got.logprob.isfinite().all()


def test_rows_give_the_results_of_these_positions() -> None:
    data = case()
    rows = torch.tensor([30, 2, 17])
    logprob, entropy = fused_logprob_and_entropy(
        data.hidden, data.weight, data.target[rows], rows=rows, temperature=data.temperature[rows], vocab_size=VOCAB
    )
    want = reference(data)
    torch.testing.assert_close(logprob.double(), want.logprob[rows], rtol=1e-5, atol=1e-6)
    assert entropy is not None
    torch.testing.assert_close(entropy.double(), want.entropy[rows], rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_weight_gradient_goes_into_megatrons_buffer(dtype: torch.dtype, tied: bool) -> None:
    """Added to what is there, in float32, and autograd delivers exactly one tensor so that the DDP hook fires."""
    data = case(dtype)
    g, h = data.coefficients

    def token_loss(logprob: Tensor, entropy: Tensor | None, tokens: slice) -> Tensor:
        assert entropy is not None
        return logprob @ g[tokens] + entropy @ h[tokens]

    for fused_loss in (False, True):
        hidden, weight = (value.clone().requires_grad_() for value in (data.hidden, data.weight))
        weight.main_grad = torch.full((WIDTH, HIDDEN), 2.0)  # type: ignore[attr-defined]
        weight.zero_out_wgrad = tied  # type: ignore[attr-defined]
        fired = []
        weight.register_post_accumulate_grad_hook(fired.append)
        options: dict[str, Any] = {"vocab_size": VOCAB, "temperature": data.temperature, "token_chunk": 5}
        if fused_loss:
            loss, *_ = fused_policy_loss(hidden, weight, data.target, token_loss, main_grad=weight.main_grad, **options)
        else:
            logprob, entropy = fused_logprob_and_entropy(
                hidden, weight, data.target, main_grad=weight.main_grad, entropy_gradient=True, **options
            )
            loss = token_loss(logprob, entropy, slice(None))
        loss.backward()
        want = reference(data).dweight
        error = (weight.main_grad - 2.0) - want
        assert error.norm() <= 2e-6 * want.norm()
        assert torch.equal(weight.main_grad[VOCAB:], torch.full((WIDTH - VOCAB, HIDDEN), 2.0))
        assert len(fired) == 1
        assert weight.grad_added_to_main_grad
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
        assert not tied or not weight.grad.any()


def test_weight_gradient_keeps_float32_accuracy_over_64_chunks() -> None:
    generator = torch.Generator().manual_seed(5)
    data = case(torch.bfloat16, tokens=64 * 8)
    main_grad = torch.zeros(WIDTH, HIDDEN)
    hidden, weight = (value.clone().requires_grad_() for value in (data.hidden, data.weight))
    data.coefficients = torch.randn(2, 64 * 8, generator=generator)
    logprob, entropy = fused_logprob_and_entropy(
        hidden,
        weight,
        data.target,
        temperature=data.temperature,
        vocab_size=VOCAB,
        entropy_gradient=True,
        token_chunk=8,
        main_grad=main_grad,
    )
    (logprob @ data.coefficients[0] + entropy @ data.coefficients[1]).backward()
    want = reference(data).dweight
    assert (main_grad - want).norm() <= 1e-6 * want.norm()


def test_another_scale_than_announced_is_an_error() -> None:
    data = case()
    hidden, weight = (value.clone().requires_grad_() for value in (data.hidden, data.weight))

    def loss(scale: float) -> Tensor:
        value, *_ = fused_policy_loss(
            hidden,
            weight,
            data.target,
            lambda logprob, entropy, tokens: logprob.sum(),
            main_grad=torch.zeros(WIDTH, HIDDEN),
            gradient_scale=scale,
        )
        return value

    (loss(4.0) * 4.0).backward()
    with pytest.raises(RuntimeError, match=r"gradient_scale=4.0.*another factor arrived: 1"):
        loss(4.0).backward()


def test_announced_scale_multiplies_all_gradients() -> None:
    data = case()
    results = []
    for scale in (1.0, 4.0):
        hidden, weight = (value.clone().requires_grad_() for value in (data.hidden, data.weight))
        main_grad = torch.zeros(WIDTH, HIDDEN)
        loss, *_ = fused_policy_loss(
            hidden,
            weight,
            data.target,
            lambda logprob, entropy, tokens: logprob.sum(),
            main_grad=main_grad,
            gradient_scale=scale,
        )
        (loss * scale).backward()
        results.append((hidden.grad, main_grad))
    (dhidden, dweight), (scaled_dhidden, scaled_dweight) = results
    assert dhidden is not None
    torch.testing.assert_close(dhidden * 4, scaled_dhidden)
    torch.testing.assert_close(dweight * 4, scaled_dweight)


def test_without_gradients_only_values_are_computed() -> None:
    data = case()
    want = reference(data)
    options: dict[str, Any] = {"temperature": data.temperature, "vocab_size": VOCAB}
    with torch.no_grad():
        logprob, entropy = fused_logprob_and_entropy(data.hidden, data.weight, data.target, **options)
        loss, again, _ = fused_policy_loss(
            data.hidden, data.weight.requires_grad_(), data.target, lambda logprob, *_: logprob.sum(), **options
        )
    assert not loss.requires_grad
    for value in (logprob, again):
        torch.testing.assert_close(value.double(), want.logprob, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), want.logprob.sum(), rtol=1e-5, atol=1e-5)
    assert entropy is not None


@pytest.mark.parametrize(("train_hidden", "train_weight"), itertools.product((False, True), repeat=2))
def test_frozen_inputs_get_no_gradient(train_hidden: bool, train_weight: bool) -> None:
    data = case()
    want = reference(data, entropic=0.0)
    g = data.coefficients[0]
    for fused_loss in (False, True):
        hidden, weight = data.hidden.clone(), data.weight.clone()
        hidden.requires_grad_(train_hidden)
        weight.requires_grad_(train_weight)
        options: dict[str, Any] = {"temperature": data.temperature, "vocab_size": VOCAB}
        if fused_loss:
            loss, *_ = fused_policy_loss(
                hidden,
                weight,
                data.target,
                lambda logprob, _, tokens: logprob @ data.coefficients[0, tokens],
                **options,
            )
        else:
            loss = fused_logprob_and_entropy(hidden, weight, data.target, **options)[0] @ g
        assert loss.requires_grad == (train_hidden or train_weight)
        if not loss.requires_grad:
            continue
        loss.backward()
        for leaf, wanted, gradient in ((hidden, train_hidden, want.dhidden), (weight, train_weight, want.dweight)):
            assert (leaf.grad is not None) == wanted
            if leaf.grad is not None:
                assert (leaf.grad - gradient).norm() <= 1e-5 * gradient.norm()


def test_a_loss_that_ignores_a_token_or_the_policy() -> None:
    data = case()
    hidden, weight = (value.clone().requires_grad_() for value in (data.hidden, data.weight))
    loss, *_ = fused_policy_loss(
        hidden, weight, data.target, lambda logprob, _, tokens: logprob.new_ones(()), token_chunk=10
    )
    loss.backward()
    assert float(loss.detach()) == 4.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_a_row_of_losses_is_refused() -> None:
    data = case()
    with pytest.raises(ValueError, match=r"token_loss must return a scalar, got \(37,\)"):
        fused_policy_loss(
            data.hidden.requires_grad_(), data.weight, data.target, lambda logprob, *_: logprob, token_chunk=100
        )


def test_a_second_backward_pass_is_refused() -> None:
    data = case()
    hidden = data.hidden.requires_grad_()
    loss, *_ = fused_policy_loss(hidden, data.weight, data.target, lambda logprob, *_: logprob.sum())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


def test_double_backward_is_refused() -> None:
    data = case()
    hidden = data.hidden.requires_grad_()
    logprob, _ = fused_logprob_and_entropy(hidden, data.weight, data.target)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(logprob.sum(), hidden, create_graph=True)
    loss, *_ = fused_policy_loss(hidden, data.weight, data.target, lambda logprob, *_: logprob.sum())
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(4, 8, 1)}, "hidden must be floating point with two dimensions"),
        ({"weight": torch.zeros(10, 9)}, r"weight must be torch.float32 \[V/R, 8\]"),
        ({"weight": torch.zeros(10, 8).bfloat16()}, r"weight must be torch.float32 \[V/R, 8\]"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target must be int64 \[4\]"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": torch.ones(3)}, r"temperature must be a number or \[4\]"),
        ({"vocab_size": 11}, "vocab_size 11 does not fit"),
        ({"main_grad": torch.zeros(10, 8).bfloat16()}, r"main_grad must be torch.float32 \(10, 8\)"),
        ({"token_chunk": 0}, "must be at least 1"),
        ({"loss_mask": torch.ones(4)}, r"loss_mask must be bool \(4,\)"),
        ({"loss_mask": torch.ones(4).bool(), "rows": torch.arange(4)}, "give one of them"),
        ({"rows": torch.ones(4)}, r"rows must be int64 \[N\]"),
        ({"backend": "cuda"}, "backend must be auto, eager or triton"),
        ({"entropy_gradient": True, "need_entropy": False}, "needs need_entropy"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(10, 8),
        "target": torch.zeros(4, dtype=torch.int64),
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        fused_logprob_and_entropy(given.pop("hidden"), given.pop("weight"), given.pop("target"), **given)
