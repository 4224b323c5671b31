"""The numbers of an evaluation, all of them computed from stored responses and from nothing else."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import comb

import numpy as np

from megatron_entropic.errors import UserError
from megatron_entropic.evaluation.generations import Generation


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems and its 95 % interval from resampled problems."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with all responses to it."""

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
    """Number of responses to each problem, N."""
    average: Estimate
    """avg@N: the mean pass rate."""
    pass_at: dict[int, Estimate]
    """pass@k for k = 1, ..., N."""
    majority: Estimate | None
    """maj@N; a problem without a readable answer counts as wrong. None if no response at all has one."""
    mean_tokens: float
    truncated: float
    """Share of responses that ended at the limit of tokens."""
    sampled_entropy: float | None
    """Mean of -log p over all sampled tokens, nats; None for greedy decoding.

    Its expectation at each position is the entropy of the distribution the token was drawn from (after temperature,
    top-p and top-k): an estimate from samples, not the full-vocabulary entropy that training controls.
    """
    verifier_timeouts: int
    verifier_errors: int


def problems_of(generations: Sequence[Generation]) -> list[Problem]:
    """Group responses by problem.

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
    """Compute the numbers of one benchmark."""
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


# avg@N, pass@k, maj@N and their intervals. P problems, N responses to each.

RESAMPLES = 10_000
_COVERAGE = 0.95


def pass_at_k(responses: int, correct: int, k: int) -> float:
    """Probability that k of `responses` responses, drawn without replacement, contain a correct one.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374), exact integers.

    Raises:
        ValueError: k outside [1, responses].
    """
    if not 1 <= k <= responses:
        raise ValueError(f"pass@{k} needs at least {k} responses and k >= 1; there are {responses}")
    return 1.0 - comb(responses - correct, k) / comb(responses, k)


def majority_is_correct(answers: Sequence[str | None], correct: Sequence[bool]) -> bool | None:
    """Whether the answer given most often is correct; among equally frequent ones the first given counts.

    Answers are compared as written. Responses without an answer do not vote.

    Returns:
        None if no response has an answer that could be read.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    winner = max(votes, key=lambda answer: votes[answer])
    # Equal answers have equal verdicts, unless one of them had none, by a timeout or an error.
    return any(right for answer, right in zip(answers, correct, strict=True) if answer == winner)


def bootstrap_weights(problems: int, *, seed: int) -> np.ndarray:
    """Draw resamples of problems, [RESAMPLES, P] float64: how often each one takes each of the P problems, over P.

    A mean over problems in every resample is then one product with the problems' values.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    return draw.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES) / problems


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of resampled means [RESAMPLES]."""
    low, high = np.quantile(resampled, [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2])
    return float(low), float(high)


def sign_flip_p_value(differences: np.ndarray, *, seed: int) -> float:
    """Two-sided p-value of the mean of paired differences [P] against 0, by random sign flips.

    Under the hypothesis that both sides of a pair are exchangeable each difference may have either sign. The observed
    assignment counts as one of the permutations, so that the value is never 0.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    signs = draw.integers(0, 2, size=(RESAMPLES, differences.size)) * 2 - 1
    flipped = np.abs(signs @ differences)
    # Sums of the same numbers in another order differ in the last bits.
    reached = flipped >= abs(differences.sum()) - 1e-9
    return float((reached.sum() + 1) / (RESAMPLES + 1))


# Two evaluations of the same problems, compared problem by problem.


@dataclass(frozen=True, slots=True)
class Comparison:
    """Difference of two evaluations on one benchmark, second minus first."""

    name: str
    problems: int
    """Number of problems, the same in both evaluations."""
    difference: Estimate
    """Difference of avg@N, its interval from resampled pairs."""
    p_value: float
    """Two-sided p-value, from sign flips of the per-problem differences."""
    better: int
    """Number of problems with a higher pass rate in the second."""
    worse: int


def compare(name: str, first: Sequence[Problem], second: Sequence[Problem]) -> Comparison:
    """Compare pass rates; the number of responses may differ, the problems may not.

    Raises:
        UserError: the evaluations are not of the same problems.
    """
    # Not by their prompts: two models may have different chat templates.
    keys = [[(problem.index, problem.ground_truth) for problem in side] for side in (first, second)]
    if keys[0] != keys[1]:
        raise UserError(f"{name}: the two evaluations are not of the same problems (row and ground truth differ)")
    differences = np.array([b.pass_rate - a.pass_rate for a, b in zip(first, second, strict=True)])
    seed = zlib.crc32(name.encode())
    resampled = bootstrap_weights(len(first), seed=seed) @ differences
    return Comparison(
        name=name,
        problems=len(first),
        difference=Estimate(float(differences.mean()), *interval(resampled)),
        p_value=sign_flip_p_value(differences, seed=seed),
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
    )
