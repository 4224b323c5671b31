"""The instruments of benchmarks/ against what is known without them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import counted_collectives, peak_extra_bytes
from benchmarks.problems import Case, Problem, Truth
from benchmarks.references import full_softmax

CPU = torch.device("cpu")
MIB = 1 << 20


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def test_peak_is_that_of_the_moment() -> None:
    """1 and 2 MiB at once, then 2.5 MiB, then less: in order, neither the sum nor the end."""

    def work() -> Tensor:
        first, second = _bytes(MIB), _bytes(2 * MIB)
        del first
        third = _bytes(MIB // 2)
        del second
        return third

    peak, third = peak_extra_bytes(work, CPU)
    assert peak == 3 * MIB
    assert third.nbytes == MIB // 2


def test_peak_counts_what_autograd_keeps_and_returns() -> None:
    """Forward keeps the result of exp; backward multiplies it with the incoming gradient into a third tensor."""
    x = torch.ones(MIB // 4, requires_grad=True)

    def work() -> Tensor:
        return torch.autograd.grad(x.exp(), x, torch.ones_like(x))[0]

    assert peak_extra_bytes(work, CPU)[0] == 3 * MIB


def test_peak_ignores_what_was_there_before() -> None:
    kept = [_bytes(8 * MIB)]

    def work() -> Tensor:
        kept.clear()
        return _bytes(5 * MIB)

    assert peak_extra_bytes(work, CPU)[0] == 5 * MIB


def test_end_of_an_older_tensor_at_a_remembered_address_does_not_count() -> None:
    """The profiler saw 1 MiB made at an address, not its end; what has that address later ends within `work`."""
    for _ in range(20):
        _, result = peak_extra_bytes(lambda: _bytes(MIB), CPU)
        del result
        kept = [_bytes(MIB)]

        def work(kept: list[Tensor] = kept) -> Tensor:
            kept.clear()
            return _bytes(5 * MIB)

        assert peak_extra_bytes(work, CPU)[0] == 5 * MIB


def test_collectives_are_restored_after_counting() -> None:
    before = dist.all_reduce
    with counted_collectives([]) as traffic:
        assert dist.all_reduce is not before
    assert dist.all_reduce is before
    assert (traffic.calls, traffic.bytes) == (0, 0)


def test_float64_solution_agrees_with_autograd() -> None:
    """float32 results are within rounding of it, float64 ones much closer."""
    for dtype, limit in (("float32", 1e-5), ("float64", 1e-12)):
        problem = Problem(Case(tokens=70, vocab=300, dtype=dtype), None, CPU)
        (logits,) = problem.inputs()
        if dtype == "float64":
            log_p = logits.log_softmax(-1)
            logprob = log_p.gather(1, problem.target[:, None]).squeeze(1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            problem.g, problem.h = problem.g.double(), None if problem.h is None else problem.h.double()
        else:
            logprob, entropy = full_softmax(logits, problem.target)
        gradient = torch.autograd.grad(problem.whole_loss(logprob, entropy), logits)
        errors = Truth(problem).errors(logprob.detach(), entropy.detach(), gradient)
        assert max(errors.logprob, errors.entropy, errors.gradient) <= limit
