"""JSON lines that survive kills, torn lines, resumes and full disks."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_entropic.errors import RunError
from megatron_entropic.files.jsonl import JsonLinesWriter, read_json_lines

ROWS = st.lists(st.dictionaries(st.text(max_size=8), st.text() | st.integers() | st.none(), max_size=4), max_size=6)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    writer = JsonLinesWriter(path)
    for row in rows:
        writer.append(row)
    writer.close()


@settings(deadline=None, max_examples=50)
@given(rows=ROWS, cut=st.integers(0, 10_000), more=ROWS)
def test_a_file_cut_anywhere_is_read_and_continued(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], cut: int, more: list[dict[str, Any]]
) -> None:
    """Whatever byte a kill stopped at: the whole lines before it are read, and new ones follow them cleanly."""
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    write(path, rows)
    content = path.read_bytes()
    kept = content[: min(cut, len(content))]
    path.write_bytes(kept)
    whole = rows[: kept.count(b"\n")]
    assert read_json_lines(path) == whole
    write(path, more)
    assert read_json_lines(path) == whole + more


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = JsonLinesWriter(tmp_path / "deep" / "a.jsonl")
    for step in range(3):
        writer.append({"step": step})
        assert read_json_lines(tmp_path / "deep" / "a.jsonl")[-1] == {"step": step}


@pytest.mark.parametrize("tail", [b'{"step": 3', b'{"step": 3\n', b"\0" * 40, b"\0" * 40 + b"\n", b"\xff\xfe\n"])
def test_torn_tails(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [{"step": 1}, {"step": 2}])
    path.write_bytes(path.read_bytes() + tail)
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    write(path, [{"step": 3}])
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_damage_in_the_middle_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not valid JSON"):
        read_json_lines(path)
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object, found list"):
        read_json_lines(path)


@pytest.mark.parametrize("keep", range(-1, 7))
def test_truncate_after(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.jsonl"
    steps = [0, 1, 1, 2, 4, 5]
    writer = JsonLinesWriter(path)
    writer.append_all([{"step": step} for step in steps])
    writer.truncate_after(keep)
    writer.append({"step": keep + 1})
    writer.close()
    assert [row["step"] for row in read_json_lines(path)] == [s for s in steps if s <= keep] + [keep + 1]


def test_text_of_a_broken_response_is_kept(tmp_path: Path) -> None:
    text = "half a character \udc80, a \u2028 separator, a line\nbreak"
    write(tmp_path / "a.jsonl", [{"text": text}])
    assert read_json_lines(tmp_path / "a.jsonl") == [{"text": text}]


def test_not_a_number_is_refused_rather_than_written(tmp_path: Path) -> None:
    writer = JsonLinesWriter(tmp_path / "a.jsonl")
    with pytest.raises(ValueError):
        writer.append({"x": float("nan")})
    writer.append({"x": 1})
    assert read_json_lines(tmp_path / "a.jsonl") == [{"x": 1}]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_folder_was_deleted_does_not_write_into_nowhere(tmp_path: Path, *, replaced: bool) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    writer.append({"step": 1})
    shutil.rmtree(path.parent)
    if replaced:
        write(path, [{"step": 7}])
    with pytest.raises(RunError, match=r"metrics\.jsonl was deleted or replaced while it was written to"):
        writer.append({"step": 2})


def test_a_full_disk_loses_nothing_that_was_written(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow in the middle of a line, as a full disk does."""
    path = tmp_path / "a.jsonl"
    program = f"""
        import resource
        from pathlib import Path
        from megatron_entropic.files.jsonl import JsonLinesWriter

        writer = JsonLinesWriter(Path({str(path)!r}))
        writer.append({{"step": 1}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
        try:
            writer.append({{"step": 2, "text": "x" * 100}})
        except OSError as error:
            assert {str(path)!r} in str(error), error
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            writer.append({{"step": 3}})
            writer.close()
        else:
            raise SystemExit("the write should have failed")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """JSON allows a carriage return between values, and U+2028 inside a string."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1,\r "a": "\xe2\x80\xa8"}\n{"step": 2}\n')
    assert read_json_lines(path) == [{"step": 1, "a": "\u2028"}, {"step": 2}]
    writer = JsonLinesWriter(path)
    writer.truncate_after(1)
    writer.close()
    assert read_json_lines(path) == [{"step": 1, "a": "\u2028"}]
