"""The numbers of an evaluation, all of them computed from stored responses and from nothing else."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from megatron_entropic.errors import UserError
from megatron_entropic.evaluation.generations import Generation
from megatron_entropic.evaluation.statistics import bootstrap_weights, interval, majority_is_correct, pass_at_k


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems and its 95 % interval from resampled problems."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Problem:
    """What became of one problem."""

    index: int
    prompt: str
    ground_truth: str
    generations: tuple[Generation, ...]

    @property
    def correct(self) -> int:
        """Number of correct responses."""
        return sum(generation.correct for generation in self.generations)

    @property
    def pass_rate(self) -> float:
        """Share of correct responses."""
        return self.correct / len(self.generations)


@dataclass(frozen=True, slots=True)
class BenchmarkSummary:
    """The numbers of one benchmark. P problems, N responses to each."""

    name: str
    problems: int
    samples: int
    """N."""
    average: Estimate
    """avg@N: the mean pass rate."""
    pass_at: dict[int, Estimate]
    """pass@k for k = 1, ..., N."""
    majority: Estimate | None
    """maj@N; a problem without a readable answer counts as wrong. None if no response at all has one."""
    mean_tokens: float
    truncated: float
    """Share of responses that ended at the limit."""
    sampled_entropy: float | None
    """Mean of -log p over all sampled tokens, nats; None for greedy decoding.

    Its expectation at each position is the entropy of the distribution the token was drawn from (after temperature,
    top-p and top-k): an estimate from samples, not the full-vocabulary entropy that training controls.
    """
    verifier_timeouts: int
    verifier_errors: int


def problems_of(generations: Sequence[Generation]) -> list[Problem]:
    """Responses grouped by problem.

    Args:
        generations: in the order of `read_generations`.

    Raises:
        UserError: no responses, or problems with different numbers of them.
    """
    problems = [
        Problem(index, group[0].prompt, group[0].ground_truth, tuple(group))
        for index, members in groupby(generations, key=lambda generation: generation.problem)
        if (group := list(members))
    ]
    counts = Counter(len(problem.generations) for problem in problems)
    if len(counts) != 1:
        raise UserError(f"every problem needs the same number of responses; found {dict(counts)} (responses: problems)")
    return problems


def summarise(name: str, problems: Sequence[Problem], *, greedy: bool) -> BenchmarkSummary:
    """The numbers of one benchmark."""
    samples = len(problems[0].generations)
    generations = [generation for problem in problems for generation in problem.generations]
    tokens = sum(len(generation.response_tokens) for generation in generations)
    statuses = Counter(generation.verifier_status for generation in generations)
    weights = bootstrap_weights(len(problems), seed=zlib.crc32(name.encode()))

    def estimate(values: Sequence[float]) -> Estimate:
        array = np.asarray(values, dtype=np.float64)
        return Estimate(float(array.mean()), *interval(weights @ array))

    votes = [_majority(problem) for problem in problems]
    return BenchmarkSummary(
        name=name,
        problems=len(problems),
        samples=samples,
        average=estimate([problem.pass_rate for problem in problems]),
        pass_at={
            k: estimate([pass_at_k(samples, problem.correct, k) for problem in problems]) for k in range(1, samples + 1)
        },
        majority=None if all(vote is None for vote in votes) else estimate([float(vote or 0) for vote in votes]),
        mean_tokens=tokens / len(generations),
        truncated=sum(generation.finish_reason == "length" for generation in generations) / len(generations),
        sampled_entropy=None if greedy or not tokens else -sum(g.logprob_sum for g in generations) / tokens,
        verifier_timeouts=statuses["timeout"],
        verifier_errors=statuses["error"],
    )


def _majority(problem: Problem) -> bool | None:
    answers = [generation.answer for generation in problem.generations]
    return majority_is_correct(answers, [generation.correct for generation in problem.generations])
