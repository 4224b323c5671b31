"""One case, all its contenders: memory, collectives and errors once, then times in interleaved repetitions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from benchmarks.contenders import Contender
from benchmarks.measure import Seconds, Stopwatch, counted_collectives, peak_extra_bytes
from benchmarks.problems import Case, Errors, Problem, Truth


@dataclass(frozen=True)
class Trial:
    """What one rank found out about one contender. Times are medians, None without repetitions."""

    case: Case
    contender: str
    forward: Seconds | None
    total: Seconds | None
    """Forward and backward."""
    peak_bytes: int
    """Tensors beyond the inputs, gradients included."""
    collectives: tuple[int, int]
    """Forward, backward."""
    sent_bytes: tuple[int, int]
    """What this rank contributed to them."""
    errors: Errors | None

    @property
    def shards(self) -> float:
        """Peak in shards of logits."""
        return self.peak_bytes / self.case.shard_bytes


@dataclass(frozen=True)
class _Inspection:
    peak_bytes: int
    collectives: tuple[int, int]
    sent_bytes: tuple[int, int]
    errors: Errors | None


def run_case(
    case: Case, contenders: Sequence[Contender], group: dist.ProcessGroup | None, device: torch.device
) -> list[Trial]:
    """All contenders on this rank; every rank of the group calls it with the same ones."""
    problem = Problem(case, group, device)
    truth = Truth(problem) if case.errors else None
    inspections = [_inspect(contender, problem, truth) for contender in contenders]
    del truth
    times: list[list[tuple[Seconds, Seconds]]] = [[] for _ in contenders]
    for _ in range(case.repetitions):
        for contender, taken in zip(contenders, times, strict=True):
            taken.append(_time(contender, problem))
    trials = []
    for contender, inspection, taken in zip(contenders, inspections, times, strict=True):
        forward, total = (_median([pair[stage] for pair in taken]) for stage in (0, 1))
        trials.append(Trial(case, contender.name, forward, total, **vars(inspection)))
    return trials


def _inspect(contender: Contender, problem: Problem, truth: Truth | None) -> _Inspection:
    groups = [] if problem.group is None else [problem.group]
    inputs = problem.inputs()
    measured: list[_Inspection] = []

    def work() -> tuple[torch.Tensor, ...]:
        with counted_collectives(groups) as forward:
            loss, logprob, entropy = contender.forward(problem, *inputs)
        with counted_collectives(groups) as backward:
            gradients = torch.autograd.grad(loss, inputs)
        counts = (forward.calls, backward.calls), (forward.bytes, backward.bytes)
        measured.append(_Inspection(0, *counts, errors=None))
        values = (logprob, logprob if entropy is None else entropy, *gradients)
        return tuple(value.detach() for value in values)

    peak, (logprob, entropy, *gradients) = peak_extra_bytes(work, problem.device)
    errors = None if truth is None else truth.errors(logprob, entropy, tuple(gradients))
    return _Inspection(peak, measured[0].collectives, measured[0].sent_bytes, errors)


def _time(contender: Contender, problem: Problem) -> tuple[Seconds, Seconds]:
    """(forward, forward and backward)."""
    inputs = problem.inputs()
    if problem.group is not None:
        dist.barrier(problem.group)
    watch = Stopwatch(problem.device)
    watch.mark()
    loss = contender.forward(problem, *inputs)[0]
    watch.mark()
    torch.autograd.grad(loss, inputs)
    watch.mark()
    forward, total = watch.since_first()
    return forward, total


def _median(taken: Sequence[Seconds]) -> Seconds | None:
    if not taken:
        return None
    return Seconds(statistics.median(t.cpu for t in taken), statistics.median(t.wall for t in taken))
