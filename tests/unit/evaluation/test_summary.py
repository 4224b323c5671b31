"""From stored responses to numbers, tables, comparisons and pages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_entropic.data.filters import recorded_form
from megatron_entropic.evaluation.generations import Generation, read_generations, write_generations
from megatron_entropic.evaluation.page import write_evaluation_page
from megatron_entropic.evaluation.store import (
    generations_path,
    in_paper_order,
    load_evaluation,
    summarise_stored,
    write_summary,
)
from megatron_entropic.evaluation.summary import compare, problems_of, summarise
from megatron_entropic.files.formats import FileFormat, NewerFormat

READ = FileFormat.read
SETTINGS = {"sampling": {"temperature": 1.0}}


def generation(problem: int, sample: int, *, correct: bool, answer: str | None = "1") -> Generation:
    return Generation(
        problem=problem,
        sample=sample,
        prompt=f"problem {problem} <b>",
        response="so \ud7ff \\boxed{1}",
        answer=answer,
        ground_truth="1",
        reward=float(correct),
        verifier_status="ok" if answer else "timeout",
        response_tokens=[5, 6, 7][: sample + 1],
        logprob_sum=-1.5,
        finish_reason="stop" if sample else "length",
    )


def stored(directory: Path, name: str, rates: list[int]) -> None:
    """An evaluation of len(rates) problems with 3 responses each, `rate` of them correct."""
    rows = [generation(i, s, correct=s < rate, answer=str(s < rate)) for i, rate in enumerate(rates) for s in range(3)]
    write_generations(generations_path(directory, name), rows, SETTINGS)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = [generation(i, s, correct=bool(s), answer=None if i else "1") for i in range(3) for s in range(2)]
    write_generations(tmp_path / "a.parquet", list(reversed(rows)), SETTINGS)
    assert read_generations(tmp_path / "a.parquet") == (rows, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.parquet: not the stored responses"):
        read_generations(tmp_path / "a.parquet")


def test_files_of_a_newer_version_are_refused_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the files that are read back, whoever reads it."""
    stored(tmp_path, "aime24", [0, 1])
    write_summary(tmp_path, "a run", [summarise_stored(tmp_path, "aime24")[1]])
    assert len(load_evaluation(tmp_path).summaries) == 1
    monkeypatch.setattr("megatron_entropic.files.formats.FileFormat.read", _as_if_from_the_future)
    for read in (
        lambda: load_evaluation(tmp_path),
        lambda: read_generations(generations_path(tmp_path, "aime24")),
        lambda: recorded_form(generations_path(tmp_path, "aime24")),
    ):
        with pytest.raises(NewerFormat, match=r"(evaluation\.json|aime24\.parquet): written by a newer meg"):
            read()


def _as_if_from_the_future(file_format: FileFormat, content: dict[str, Any], path: Path) -> dict[str, Any]:
    return READ(replace(file_format, version=content["format_version"] - 1), content, path)


def test_the_numbers(tmp_path: Path) -> None:
    stored(tmp_path, "aime24", [0, 1, 3, 2])
    problems, summary = summarise_stored(tmp_path, "aime24")
    assert [problem.correct for problem in problems] == [0, 1, 3, 2]
    assert (summary.problems, summary.samples) == (4, 3)
    assert summary.average.value == pytest.approx(0.5)
    assert summary.average.low < 0.5 < summary.average.high
    assert {k: e.value for k, e in summary.pass_at.items()} == pytest.approx({1: 0.5, 2: 2 / 3, 3: 0.75})
    assert summary.majority is not None
    assert summary.majority.value == pytest.approx(0.5)
    assert summary.mean_tokens == 2.0
    assert summary.truncated == pytest.approx(1 / 3)
    assert summary.sampled_entropy == pytest.approx(0.75)
    assert (summary.verifier_timeouts, summary.verifier_errors) == (0, 0)


def test_greedy_decoding_has_no_entropy_and_no_answer_no_majority() -> None:
    problems = problems_of([generation(0, 0, correct=False, answer=None)])
    summary = summarise("x", problems, greedy=True)
    assert summary.sampled_entropy is None
    assert summary.majority is None
    assert summary.verifier_timeouts == 1


def test_problems_with_different_numbers_of_responses_are_refused() -> None:
    rows = [generation(0, 0, correct=True), generation(0, 1, correct=True), generation(1, 0, correct=True)]
    with pytest.raises(ValueError, match="same number of responses"):
        problems_of(rows)


def test_the_columns_are_in_the_order_of_the_paper() -> None:
    names = ["own", "cmimc25", "Minerva", "AIME-25", "olympiad_bench", "aime24", "MATH-500", "amc23", "omni-math"]
    problems = problems_of([generation(0, 0, correct=True)])
    ordered = in_paper_order([summarise(name, problems, greedy=False) for name in names])
    expected = ["MATH-500", "amc23", "aime24", "AIME-25", "olympiad_bench", "omni-math", "Minerva", "cmimc25", "own"]
    assert [summary.name for summary in ordered] == expected


def test_the_table_and_overall(tmp_path: Path) -> None:
    stored(tmp_path, "aime24", [3, 0])
    stored(tmp_path, "math500", [3, 3, 3, 0])
    write_summary(tmp_path, "my model", [summarise_stored(tmp_path, name)[1] for name in ("aime24", "math500")])
    table = (tmp_path / "table.md").read_text()
    assert "| Model | math500 (3) | aime24 (3) | Overall |" in table
    assert "| my model | 75.0 / 75.0 | 50.0 / 50.0 | 62.5 / 62.5 |" in table


def test_a_paired_comparison() -> None:
    def rated(rates: list[int]) -> list[Generation]:
        return [generation(i, s, correct=s < rate) for i, rate in enumerate(rates) for s in range(4)]

    first, second = problems_of(rated([0, 1, 2, 3] * 10)), problems_of(rated([1, 2, 3, 3] * 10))
    result = compare("x", first, second)
    assert result.difference.value == pytest.approx(3 / 16)
    assert 0 < result.difference.low < 3 / 16 < result.difference.high
    assert result.p_value < 0.001
    assert (result.better, result.worse) == (30, 0)
    assert compare("x", first, first).p_value == 1.0
    other = [replace(problem, ground_truth="2") for problem in second]
    with pytest.raises(ValueError, match="not of the same problems"):
        compare("x", first, other)


def test_hostile_text_of_models_and_data_stays_text_and_a_line_of_a_megabyte_is_cut(tmp_path: Path) -> None:
    hostile = "\x1b[2J<script>alert(1)</script></pre>\u202e\x9b1m\x00"
    rows = [
        replace(
            generation(0, sample, correct=bool(sample)),
            **dict.fromkeys(("prompt", "response", "answer", "ground_truth"), hostile + "x" * 1_000_000),
        )
        for sample in range(2)
    ]
    directory = tmp_path / "hostile"
    write_generations(generations_path(directory, "aime24"), rows, SETTINGS)
    write_summary(directory, hostile, [summarise_stored(directory, "aime24")[1]])
    page = write_evaluation_page([directory], tmp_path / "page").read_text()
    assert "<script" not in page
    assert not set("\x1b\x9b\x00\u202e") & set(page)
    assert "\u241b[2J&lt;script&gt;alert(1)" in page
    assert len(page) < 40_000


def test_the_page_shows_pass_rates_and_escapes_what_it_shows(tmp_path: Path) -> None:
    for label, rates in (("one", [3, 0]), ("two", [3, 1])):
        directory = tmp_path / label
        stored(directory, "aime24", rates)
        write_summary(directory, label, [summarise_stored(directory, "aime24")[1]])
        assert load_evaluation(directory).label == label
    page = write_evaluation_page([tmp_path / "one", tmp_path / "two"], tmp_path / "page").read_text()
    assert "two minus one" in page
    assert "+16.7" in page
    assert "1 of 3 &middot; problem 1" in page
    assert "problem 0 &lt;b&gt;" in page
    with pytest.raises(ValueError, match="no finished evaluation"):
        write_evaluation_page([tmp_path / "three"], tmp_path / "page")
