"""The fused output heads on a GPU: against stored logits in float64, and in memory that does not grow with tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contenders import liger_logprob_and_entropy
from megatron_entropic.tensor_parallel import fused_logprob_and_entropy, fused_policy_loss

HIDDEN, WIDTH, VOCABULARY = 1024, 32000, 31900


def example(device: torch.device, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, H], weight [V, H], target, and the gradients g and h of the loss."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, device=device).to(dtype)
    weight = torch.randn(WIDTH, HIDDEN, generator=generator, device=device).mul_(HIDDEN**-0.5 * 3).to(dtype)
    target = torch.randint(VOCABULARY, (tokens,), generator=generator, device=device)
    g, h = torch.randn(2, tokens, generator=generator, device=device)
    return hidden, weight, target, g, h


def run(head: str, leaves: tuple[Tensor, Tensor], target: Tensor, g: Tensor, h: Tensor, **options: Any) -> Any:
    """(logprob, entropy) after the backward pass of logprob @ g + entropy @ h."""
    options = {"vocab_size": VOCABULARY, "temperature": 0.7, **options}
    if head == "recompute":
        logprob, entropy = fused_logprob_and_entropy(*leaves, target, entropy_gradient=True, **options)
        (logprob @ g + entropy @ h).backward()
    else:

        def token_loss(logprob: Tensor, entropy: Tensor | None, tokens: slice) -> Tensor:
            assert entropy is not None
            return logprob @ g[tokens] + entropy @ h[tokens]

        loss, logprob, entropy = fused_policy_loss(*leaves, target, token_loss, **options)
        loss.backward()
    return logprob.detach(), entropy.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["recompute", "fused_loss"])
def test_parity_with_stored_logits(gpu: torch.device, head: str, dtype: torch.dtype) -> None:
    """Values are exact for the inputs as they are: bfloat16 products come out in float32.

    A GPU sums the 1,024 products of a logit in an order of its own (2 to 3e-5 on log-probs of -20 were seen on an
    H200), so torch's own float32 product on the same GPU is what ours is held against.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden, weight, target, g, h = example(gpu, 300, dtype)
    leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    logprob, entropy = run(head, leaves, target, g, h, token_chunk=128, vocab_chunk=12000)
    exact = (hidden.double().requires_grad_(), weight.double().requires_grad_())
    logp = ((exact[0] @ exact[1].T)[:, :VOCABULARY] / 0.7).log_softmax(-1)
    want_logprob, want_entropy = logp.gather(1, target[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)
    (want_logprob @ g.double() + want_entropy @ h.double()).backward()
    plain = ((hidden.float() @ weight.float().T)[:, :VOCABULARY] / 0.7).log_softmax(-1)
    plain_logprob, plain_entropy = plain.gather(1, target[:, None]).squeeze(1), -(plain.exp() * plain).sum(-1)
    for got, textbook, want in ((logprob, plain_logprob, want_logprob), (entropy, plain_entropy, want_entropy)):
        assert (got - want).abs().max() <= max(2e-5, 2 * float((textbook - want).abs().max()))
    limit = 1e-5 if dtype == torch.float32 else 5e-3
    for leaf, exact_leaf in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert exact_leaf.grad is not None
        assert (leaf.grad - exact_leaf.grad).norm() <= limit * exact_leaf.grad.norm()


@pytest.mark.parametrize("head", ["recompute", "fused_loss"])
def test_weight_gradient_accumulates_in_float32(gpu: torch.device, head: str) -> None:
    """In 64 chunks of bfloat16 inputs, against the same gradient in one."""
    hidden, weight, target, g, h = example(gpu, 64 * 32, torch.bfloat16)
    sums = []
    for token_chunk in (32, 64 * 32):
        main_grad = torch.zeros(WIDTH, HIDDEN, device=gpu)
        leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        run(head, leaves, target, g, h, token_chunk=token_chunk, main_grad=main_grad)
        sums.append(main_grad)
    assert (sums[0] - sums[1]).norm() <= 1e-5 * sums[1].norm()


@pytest.mark.parametrize("head", ["recompute", "fused_loss"])
def test_memory_does_not_grow_with_tokens_by_logits(gpu: torch.device, head: str) -> None:
    peaks = []
    for tokens in (4096, 16384):
        hidden, weight, target, g, h = example(gpu, tokens, torch.bfloat16)
        leaves = (hidden.requires_grad_(), weight.requires_grad_())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(gpu)
        before = torch.cuda.memory_allocated(gpu)
        run(head, leaves, target, g, h, token_chunk=1024)
        peaks.append(torch.cuda.max_memory_allocated(gpu) - before)
        del leaves, hidden, weight
        torch.cuda.empty_cache()
    # Hidden states and their gradient are [T, H]; a shard of logits would add 4 * WIDTH bytes a token.
    assert peaks[1] - peaks[0] <= (16384 - 4096) * HIDDEN * 2 * 4


def test_liger_agrees(gpu: torch.device, nccl: dist.ProcessGroup) -> None:
    """Loosely: without its own kernels it rounds logits to bfloat16."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    hidden, weight, target, _, _ = example(gpu, 300, torch.bfloat16)
    results = [
        compute(hidden, weight, target, group=nccl, temperature=0.7)
        for compute in (fused_logprob_and_entropy, liger_logprob_and_entropy)
    ]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0.1)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0.1)
