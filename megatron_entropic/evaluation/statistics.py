"""avg@N, pass@k, maj@N and their intervals. P problems, N responses to each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np

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
    """[RESAMPLES, P] float64: how often each resample of the problems takes each of them, over P.

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
