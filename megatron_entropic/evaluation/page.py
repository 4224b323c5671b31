"""A page about one evaluation, or about several of the same problems: numbers, pass rates, responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_entropic.evaluation.generations import Generation
from megatron_entropic.evaluation.store import StoredEvaluation, load_evaluation
from megatron_entropic.evaluation.summary import BenchmarkSummary, Comparison, Problem, compare
from megatron_entropic.files.text import shortened
from megatron_entropic.reports.pages import render_page, write_page

EVALUATION_PAGE = "evaluation.html"
_RESPONSES_SHOWN = 2
_CHARACTERS_SHOWN = 4000


def write_evaluation_page(directories: Sequence[Path], output_dir: Path) -> Path:
    """Write EVALUATION_PAGE into `output_dir`; returns its path.

    Args:
        directories: finished evaluations; every one after the first is compared with the first.

    Raises:
        ValueError: no finished evaluation in a directory, or evaluations of different problems.
    """
    evaluations = [load_evaluation(directory) for directory in directories]
    first = evaluations[0]
    page = render_page(
        Path(__file__).parent / "evaluation.html.jinja",
        title=" / ".join(evaluation.label for evaluation in evaluations),
        evaluations=[
            {
                "label": evaluation.label,
                "path": evaluation.path,
                "summaries": evaluation.summaries,
                "pass_at": [(summary.name, _pass_at(summary)) for summary in evaluation.summaries],
                "problems": [
                    (name, [_problem(problem) for problem in problems])
                    for name, problems in evaluation.problems.items()
                ],
            }
            for evaluation in evaluations
        ],
        comparisons=[(other.label, _compare(first, other)) for other in evaluations[1:]],
        first=first.label,
    )
    return write_page(output_dir / EVALUATION_PAGE, page)


def _compare(first: StoredEvaluation, second: StoredEvaluation) -> list[Comparison]:
    """Comparisons on the benchmarks that both evaluations have."""
    shared = [name for name in first.problems if name in second.problems]
    return [compare(name, first.problems[name], second.problems[name]) for name in shared]


def _pass_at(summary: BenchmarkSummary) -> list[tuple[int, float]]:
    """pass@k at k = 1, 2, 4, ... and N."""
    wanted = {1 << power for power in range(summary.samples.bit_length())} | {summary.samples}
    return [(k, estimate.value) for k, estimate in summary.pass_at.items() if k in wanted]


def _problem(problem: Problem) -> dict[str, Any]:
    """Values that the page shows of a problem: its pass rate, and a correct and a wrong response if it has both."""
    ordered = sorted(problem.generations, key=lambda generation: generation.correct, reverse=True)
    chosen = [ordered[0], *ordered[1:][-(_RESPONSES_SHOWN - 1) :]]
    return {
        "index": problem.index,
        "prompt": problem.prompt,
        "ground_truth": problem.ground_truth,
        "correct": problem.correct,
        "samples": len(problem.generations),
        "rate": problem.pass_rate,
        "responses": [_response(generation) for generation in chosen],
    }


def _response(generation: Generation) -> dict[str, Any]:
    text = shortened(generation.response, _CHARACTERS_SHOWN)
    return {"generation": generation, "text": text, "tokens": len(generation.response_tokens)}
