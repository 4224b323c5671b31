"""Who takes part: each contender turns a problem's inputs into the loss and the statistics it was computed from."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import Case, Problem
from benchmarks.references import column_parallel_logits, full_softmax, textbook_logprob_and_entropy
from megatron_entropic.tensor_parallel import fused_logprob_and_entropy, fused_policy_loss, logprob_and_entropy

Outcome = tuple[Tensor, Tensor, Tensor | None]
"""(loss, to be differentiated; logprob [T]; entropy [T] in nats or None)."""

TEXTBOOK = "textbook"
OURS = "ours"
HEAD_TEXTBOOK = "GEMM + textbook"
HEAD_OURS = "GEMM + ours"
FUSED_RECOMPUTE = "fused, recompute"
FUSED_GRADIENT = "fused, gradient in forward"


@dataclass(frozen=True)
class Contender:
    """A name for tables, and what it does with (problem, *problem.inputs())."""

    name: str
    forward: Callable[..., Outcome]


def logits_contenders(case: Case, device: torch.device) -> list[Contender]:
    """For given logits; the first is what ratios refer to."""
    found = [Contender(TEXTBOOK, _textbook)] if _has_megatron() else []
    found.append(Contender(f"{OURS}, eager", _ours("eager")))
    found.append(Contender(f"{OURS}, eager, layout_invariant", _ours("eager", layout_invariant=True)))
    if device.type == "cuda":
        found.append(Contender(f"{OURS}, triton", _ours("triton")))
    if case.ranks == 1:
        found.append(Contender("torch log_softmax", _full_softmax))
    return found


def head_contenders(device: torch.device) -> list[Contender]:
    """For hidden states and an output layer; the first is what ratios refer to."""
    found = [
        Contender(HEAD_OURS, _gemm_and_ours),
        Contender(FUSED_RECOMPUTE, _fused),
        Contender(FUSED_GRADIENT, _fused_gradient),
    ]
    if _has_megatron():
        found.append(Contender(HEAD_TEXTBOOK, _gemm_and_textbook))
    if device.type == "cuda" and _has_liger():
        found.append(Contender("Liger", _liger))
    return found


def absences(device: torch.device) -> list[str]:
    """Who does not take part, and why."""
    reasons = []
    if not _has_megatron():
        reasons.append("textbook: megatron-core is not installed")
    if device.type != "cuda":
        reasons.append("Triton backend and Liger: they need a GPU")
    elif not _has_liger():
        reasons.append("Liger: liger_kernel is not installed")
    return reasons


def _has_megatron() -> bool:
    return importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _ours(backend: Any, **options: Any) -> Callable[..., Outcome]:
    def forward(problem: Problem, logits: Tensor) -> Outcome:
        logprob, entropy = logprob_and_entropy(
            logits,
            problem.target,
            group=problem.group,
            entropy_gradient=problem.h is not None,
            backend=backend,
            **options,
        )
        assert entropy is not None
        return problem.whole_loss(logprob, entropy), logprob, entropy

    return forward


def _textbook(problem: Problem, logits: Tensor) -> Outcome:
    logprob, entropy = textbook_logprob_and_entropy(logits, problem.target, entropy_gradient=problem.h is not None)
    return problem.whole_loss(logprob, entropy), logprob, entropy


def _full_softmax(problem: Problem, logits: Tensor) -> Outcome:
    logprob, entropy = full_softmax(logits, problem.target, entropy_gradient=problem.h is not None)
    return problem.whole_loss(logprob, entropy), logprob, entropy


def _gemm_and_ours(problem: Problem, hidden: Tensor, weight: Tensor) -> Outcome:
    return _ours("auto")(problem, column_parallel_logits(hidden, weight, problem.group))


def _gemm_and_textbook(problem: Problem, hidden: Tensor, weight: Tensor) -> Outcome:
    return _textbook(problem, column_parallel_logits(hidden, weight, problem.group))


def _fused(problem: Problem, hidden: Tensor, weight: Tensor) -> Outcome:
    logprob, entropy = fused_logprob_and_entropy(
        hidden, weight, problem.target, group=problem.group, entropy_gradient=problem.h is not None
    )
    assert entropy is not None
    return problem.whole_loss(logprob, entropy), logprob, entropy


def _liger(problem: Problem, hidden: Tensor, weight: Tensor) -> Outcome:
    logprob, entropy = liger_logprob_and_entropy(hidden, weight, problem.target, group=problem.group)
    entropy = entropy if problem.h is not None else entropy.detach()
    return problem.whole_loss(logprob, entropy), logprob, entropy


def liger_logprob_and_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, group: Any, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies by Liger's tensor-parallel fused linear cross-entropy (liger-kernel >= 0.8.3), on a GPU.

    Liger chooses between kernels of its own and chunks of PyTorch without saying so. In the latter logits are rounded
    to the dtype of the model, the gradient of the weight is summed in it, and the entropy is not centred.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_scaled_cross_entropy_tp

    loss, entropy = liger_fused_linear_scaled_cross_entropy_tp(
        hidden, weight, target, group, temperature=temperature, return_entropy=True
    )
    return -loss.float(), entropy.float()


def _fused_gradient(problem: Problem, hidden: Tensor, weight: Tensor) -> Outcome:
    return fused_policy_loss(hidden, weight, problem.target, problem.token_loss, group=problem.group)
