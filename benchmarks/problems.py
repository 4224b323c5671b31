"""What is computed: logits or hidden states of a made-up policy, and the loss whose gradient is asked for.

Shapes: T tokens, V columns of the whole vocabulary, R tensor-parallel ranks, H hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.references import Float64Softmax, row_chunks

SPREAD = 2.5
"""Standard deviation of the logits: at 32k columns an entropy of about 7 nats, at which nothing underflows to zero."""


@dataclass(frozen=True)
class Case:
    """One row of a table, before anybody has computed it. `hidden` None: the logits are given; else H."""

    tokens: int
    vocab: int
    dtype: str = "float32"
    ranks: int = 1
    hidden: int | None = None
    entropy_gradient: bool = True
    offset: float = 0.0
    """Added to all logits, which changes no result."""
    repetitions: int = 0
    """Timed ones; memory, collectives and errors take one more."""
    errors: bool = True
    """Whether results are compared with float64."""
    pages_kept: bool = False
    """Whether freed memory stays with the process, see `ranks.PAGES_KEPT`."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` for torch."""
        return getattr(torch, self.dtype)

    @property
    def shard_bytes(self) -> int:
        """One rank's logits in `dtype`: the unit of the memory columns."""
        return self.tokens * (self.vocab // self.ranks) * self.torch_dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """What the gradients that are asked for occupy on one rank."""
        if self.hidden is None:
            return self.shard_bytes
        return (self.tokens + self.vocab // self.ranks) * self.hidden * self.torch_dtype.itemsize

    def describe(self) -> str:
        """For progress and messages."""
        head = "" if self.hidden is None else f", H {self.hidden}"
        remarks = "" if self.entropy_gradient else ", entropy's value only"
        remarks += ", pages kept" if self.pages_kept else ""
        remarks += f", logits + {self.offset:g}" if self.offset else ""
        return f"{self.tokens} x {self.vocab}{head}, {self.dtype}, TP {self.ranks}{remarks}"


class Problem:
    """One case on one rank. The loss is sum_t g_t logprob_t (+ h_t entropy_t), with g and h about 1 / T."""

    def __init__(self, case: Case, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.case, self.group, self.device = case, group, device
        rank = 0 if group is None else dist.get_rank(group)
        shared, own = (torch.Generator(device).manual_seed(seed) for seed in (1, 100 + rank))
        self.target = torch.randint(case.vocab, (case.tokens,), generator=shared, device=device)
        self.g, h = (torch.randn(2, case.tokens, generator=shared, device=device) / case.tokens).unbind()
        self.h = h if case.entropy_gradient else None
        width, dtype = case.vocab // case.ranks, case.torch_dtype
        if case.hidden is None:
            logits = torch.randn(case.tokens, width, generator=own, device=device).mul_(SPREAD).add_(case.offset)
            self._leaves: tuple[Tensor, ...] = (logits.to(dtype).requires_grad_(),)
        else:
            hidden = torch.randn(case.tokens, case.hidden, generator=shared, device=device)
            weight = torch.randn(width, case.hidden, generator=own, device=device).mul_(SPREAD / math.sqrt(case.hidden))
            self._leaves = (hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())

    def inputs(self) -> tuple[Tensor, ...]:
        """(logits [T, V/R],) as a layer would have made them just now, or (hidden [T, H], weight [V/R, H])."""
        return tuple(leaf.clone() for leaf in self._leaves) if self.case.hidden is None else self._leaves

    def token_loss(self, logprob: Tensor, entropy: Tensor | None, rows: slice) -> Tensor:
        """The loss of some tokens, a scalar."""
        loss = logprob @ self.g[rows]
        if self.h is None:
            return loss
        assert entropy is not None
        return loss + entropy @ self.h[rows]

    def whole_loss(self, logprob: Tensor, entropy: Tensor) -> Tensor:
        """The loss of all tokens."""
        return self.token_loss(logprob, entropy, slice(None))


@dataclass(frozen=True)
class Errors:
    """Largest differences from float64."""

    logprob: float
    """Absolute."""
    entropy: float
    """Absolute, in nats."""
    gradient: float
    """Relative to the largest element of the gradient; with an output layer the worse of its two."""


class Truth:
    """A problem solved in float64."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        leaves = [leaf.detach() for leaf in problem._leaves]
        logits = leaves[0] if len(leaves) == 1 else leaves[0].double() @ leaves[1].double().t()
        self._softmax = Float64Softmax(logits, problem.target, problem.group)
        self._head = None if len(leaves) == 1 else self._head_gradients(*leaves)

    def errors(self, logprob: Tensor, entropy: Tensor, gradients: tuple[Tensor, ...]) -> Errors:
        """Of somebody's results without a graph, gradients in the order of `Problem.inputs`."""
        if self._head is None:
            gradient = self._logits_gradient_error(gradients[0])
        else:
            gradient = max(_relative(got, want) for got, want in zip(gradients, self._head, strict=True))
        return Errors(
            float((logprob - self._softmax.logprob).abs().max()),
            float((entropy - self._softmax.entropy).abs().max()),
            gradient,
        )

    def _logits_gradient_error(self, got: Tensor) -> float:
        worst = largest = 0.0
        for rows in row_chunks(len(got)):
            want = self._softmax.gradient(rows, self._problem.g, self._problem.h)
            worst = max(worst, float((got[rows] - want).abs().max()))
            largest = max(largest, float(want.abs().max()))
        return worst / largest

    def _head_gradients(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(dL/dhidden [T, H], dL/dweight [V/R, H])."""
        dhidden = torch.empty(hidden.shape, dtype=torch.float64, device=hidden.device)
        dweight = torch.zeros(weight.shape, dtype=torch.float64, device=hidden.device)
        weight = weight.double()
        for rows in row_chunks(len(hidden)):
            d = self._softmax.gradient(rows, self._problem.g, self._problem.h)
            dhidden[rows] = d @ weight
            dweight.addmm_(d.t(), hidden[rows].double())
        if self._problem.group is not None:
            dist.all_reduce(dhidden, group=self._problem.group)
        return dhidden, dweight


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())
