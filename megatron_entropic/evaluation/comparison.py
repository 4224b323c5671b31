"""Two evaluations of the same problems, compared problem by problem."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_entropic.errors import UserError
from megatron_entropic.evaluation.statistics import bootstrap_weights, interval, sign_flip_p_value
from megatron_entropic.evaluation.summary import Estimate, Problem


@dataclass(frozen=True, slots=True)
class Comparison:
    """Second minus first on one benchmark."""

    name: str
    problems: int
    """Of both evaluations."""
    difference: Estimate
    """Of avg@N, its interval from resampled pairs."""
    p_value: float
    """Two-sided, sign flips of the per-problem differences."""
    better: int
    """Problems with a higher pass rate in the second."""
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
