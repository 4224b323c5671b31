"""Regret to the best constant, and its worst case over conditions: numbers with resampled seeds, and the page.

    best[condition]              highest mean score of the constants there
    regret[method, condition]    best[condition] - mean score of the method
    worst[method]                largest regret over conditions

Seeds are resampled within each condition, for all methods alike, and everything is computed anew, the best constant
included. So the interval of a worst case knows that a maximum was taken.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from report import NOTHING, header, mean_and_error, paired, row_of_cells

from megatron_entropic.evaluation.summary import bootstrap_weights, interval

Scores = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Condition: method: seed: score."""
SUPPORTED, REFUTED = 0.975, 0.5
"""Probabilities of a smaller worst case from which on a hypothesis is supported, and up to which it is refuted."""


@dataclass(frozen=True)
class Regrets:
    """Regrets of the methods that have all seeds of all conditions; resamples [R]."""

    conditions: tuple[str, ...]
    seeds: dict[str, tuple[int, ...]]
    """Seeds of each condition that every constant has."""
    regret: dict[str, np.ndarray]
    """[conditions] of each method."""
    worst: dict[str, np.ndarray]
    """Resampled worst cases of each method, [R]."""
    mean: dict[str, np.ndarray]
    """Resampled means over conditions of each method, [R]."""


def regrets(scores: Scores, constants: Sequence[str]) -> Regrets | None:
    """Compute regrets from the conditions in which every constant is finished on at least two common seeds.

    A method that lacks one of these seeds anywhere is left out. None without such a condition.
    """
    seeds = {}
    for condition, by_method in scores.items():
        common = set.intersection(*(set(by_method.get(constant, {})) for constant in constants))
        if len(common) > 1:
            seeds[condition] = tuple(sorted(common))
    if not seeds:
        return None
    everyone = {method for by_method in scores.values() for method in by_method}
    complete = [m for m in sorted(everyone) if all(set(s) <= set(scores[c].get(m, {})) for c, s in seeds.items())]
    observed, resampled = [], []
    for condition, own in seeds.items():
        table = np.array([[scores[condition][method][seed] for seed in own] for method in complete])
        draws = bootstrap_weights(len(own), seed=zlib.crc32(condition.encode())) @ table.T
        places = [complete.index(constant) for constant in constants]
        means = table.mean(axis=1)
        observed.append(means[places].max() - means)
        resampled.append(draws[:, places].max(axis=1, keepdims=True) - draws)
    stacked, drawn = np.stack(observed), np.stack(resampled)
    return Regrets(
        conditions=tuple(seeds),
        seeds=seeds,
        regret={method: stacked[:, index] for index, method in enumerate(complete)},
        worst={method: drawn[:, :, index].max(axis=0) for index, method in enumerate(complete)},
        mean={method: drawn[:, :, index].mean(axis=0) for index, method in enumerate(complete)},
    )


def probability_of_smaller_worst(found: Regrets, method: str, constants: Sequence[str]) -> float:
    """Share of the resamples in which the worst regret of a method is below that of the best of the constants."""
    best = np.min([found.worst[constant] for constant in constants], axis=0)
    return float((found.worst[method] < best).mean())


def verdict(probability: float) -> str:
    """The word that the plan gives to a probability."""
    if probability >= SUPPORTED:
        return "supported"
    return "refuted" if probability <= REFUTED else "undecided"


def write_page(
    path: Path,
    tables: Mapping[str, Scores],
    methods: Sequence[str],
    plan: PlanWords,
    others: Mapping[str, Scores] | None = None,
) -> Path:
    """Write the page; returns its path.

    Args:
        path: of the page.
        tables: scores by name, such as pass@1.
        methods: rows, in order.
        plan: constants and methods of the hypotheses.
        others: numbers that are shown without regret, by name: entropies, learning curves (columns are steps).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [plan.title, "", *(line for name, scores in tables.items() for line in _table(name, scores, methods, plan))]
    for name, numbers in (others or {}).items():
        lines += ["", f"## {name}", "", *_means(numbers, methods)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@dataclass(frozen=True)
class PlanWords:
    """What of the plan the page says."""

    title: str
    constants: tuple[str, ...]
    primary: tuple[str, ...] = ()
    worse: tuple[tuple[str, str], ...] = ()
    paired: tuple[tuple[str, str, str], ...] = ()


def _table(name: str, scores: Scores, methods: Sequence[str], plan: PlanWords) -> Iterator[str]:
    yield from ("", f"## {name}", "")
    yield (
        "Mean \u00b1 standard error over the seeds that are finished, their number in brackets; regret to the best of "
        f"{', '.join(plan.constants)}, 95 % interval from resampled seeds."
    )
    yield ""
    found = regrets(scores, plan.constants)
    yield from _rows(scores, methods, found)
    if found is None:
        yield from ("", "No condition has two seeds of every constant yet: no regret can be said.")
    else:
        yield from ("", f"Regrets are over {', '.join(f'{c} ({len(s)} seeds)' for c, s in found.seeds.items())}.", "")
        yield from _of_worst_cases(found, plan)
    yield from _of_pairs(scores, plan)


def _means(numbers: Scores, methods: Sequence[str]) -> Iterator[str]:
    yield from header("method", *numbers)
    for method in methods:
        columns = (list(by_method.get(method, {}).values()) for by_method in numbers.values())
        yield row_of_cells(method, *(mean_and_error(values) for values in columns))


def _rows(scores: Scores, methods: Sequence[str], found: Regrets | None) -> Iterator[str]:
    yield from header("method", *scores, "mean regret", "worst regret", "where")
    for method in methods:
        cells = []
        for by_method in scores.values():
            values = list(by_method.get(method, {}).values())
            cells.append(f"{mean_and_error(values)} ({len(values)})" if values else NOTHING)
        regret = [NOTHING] * 3
        if found is not None and method in found.regret:
            own = found.regret[method]
            worst = found.conditions[int(own.argmax())]
            regret = [
                _with_interval(own.mean(), found.mean[method]),
                _with_interval(own.max(), found.worst[method]),
                worst,
            ]
        yield row_of_cells(method, *cells, *regret)


def _of_worst_cases(found: Regrets, plan: PlanWords) -> Iterator[str]:
    for method in plan.primary:
        if method in found.worst:
            p = probability_of_smaller_worst(found, method, plan.constants)
            yield f"- P(worst regret of {method} < that of the best constant) = {p:.3f}: {verdict(p)}"
        else:
            yield f"- {method}: not finished where the constants are"
    for larger, smaller in plan.worse:
        if larger in found.worst and smaller in found.worst:
            p = probability_of_smaller_worst(found, smaller, [larger])
            yield f"- P(worst regret of {larger} > that of {smaller}) = {p:.3f}: {verdict(p)}"


def _of_pairs(scores: Scores, plan: PlanWords) -> Iterator[str]:
    for condition, method, other in plan.paired:
        by_method = scores.get(condition, {})
        both = paired(dict(by_method.get(other, {})), dict(by_method.get(method, {})))
        if both is None:
            yield f"- {condition}, {method} minus {other}: fewer than two seeds have both"
            continue
        word = "supported" if both.low > 0 else "refuted" if both.high < 0 else "undecided"
        yield (
            f"- {condition}, {method} minus {other}: {both.difference:+.3f} ({both.low:+.3f} to {both.high:+.3f}, "
            f"{both.seeds} seeds): {word}"
        )


def _with_interval(value: float, resampled: np.ndarray) -> str:
    low, high = interval(resampled)
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
