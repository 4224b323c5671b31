"""The input of `megatron-entropic score`: every line that is JSON is one line, everything else is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_entropic.data.token_file import TokenLine, read_token_file, write_scored_file
from megatron_entropic.errors import UserError


def test_line_separators_inside_strings_end_no_line(tmp_path: Path) -> None:
    lines = [{"tokens": [1, 2], "prompt_length": 1, "note": f"a{mark}b"} for mark in "\u2028\u2029\x85\x0c\x1c"]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    # JSON has to escape control characters below a blank; the others may stand as they are.
    path = tmp_path / "in.jsonl"
    path.write_bytes(text.encode())
    assert [line.record for line in read_token_file(path, 3)] == lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not UTF-8 text"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b'{"tokens": [' + b"1" * 5000 + b'], "prompt_length": 1}', "line 1: not JSON"),
        (b"\n\n", "no lines to score"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_token_file(tmp_path / "in.jsonl", 3)


@pytest.mark.parametrize(("logprob", "entropy"), [(float("nan"), 1.0), (-0.5, float("inf")), (float("-inf"), None)])
def test_scores_that_are_no_numbers_are_refused(tmp_path: Path, logprob: float, entropy: float | None) -> None:
    """They were written as NaN, which is not JSON, and status 0."""
    record = {"tokens": [1, 2], "prompt_length": 1}
    lines = [TokenLine([1, 2], 1, record)] * 2
    entropies = [None if entropy is None else [value] for value in (1.0, entropy)]
    with pytest.raises(UserError, match=r"for 1 of 2 lines, the first of them sequence 2\. Look for such"):
        write_scored_file(tmp_path / "out.jsonl", lines, [[-0.5], [logprob]], entropies)
    assert not list(tmp_path.iterdir())
