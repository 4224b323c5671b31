"""Rows, files and folders that are no training data: one UserError that names file and row; nothing passes silently."""

from __future__ import annotations

import datetime
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_entropic.config.run import DataConfig
from megatron_entropic.data import TaskDataset, WarmStartPairs
from megatron_entropic.errors import UserError

GOOD = {"problem": "1+1", "answer": "2"}
LINE = json.dumps(GOOD)


def _message(content: Any, role: Any = "user") -> dict[str, Any]:
    return {"prompt": [{"role": role, "content": content}], "answer": "1"}


def _truth(value: Any) -> dict[str, Any]:
    return {"problem": "1", "answer": value}


# Name: (row as JSON text, what the message says of it). Each stands in line 2, after a good row.
ROWS: dict[str, tuple[str, str]] = {
    "cut": (LINE[:-4], "not valid JSON"),
    "two values": (LINE + LINE, "not valid JSON"),
    "single quotes": (str(GOOD), "not valid JSON"),
    "a comma after the last": ('{"problem": "1", "answer": "2",}', "not valid JSON"),
    "a comment": ("// " + LINE, "not valid JSON"),
    "deep list": ('{"problem": ' + "[" * 60000, "nested too deeply"),
    "deep object": ('{"a":' * 60000, "nested too deeply"),
    "deep and closed": ('{"problem": ' + "[" * 60000 + "]" * 60000 + "}", "nested too deeply"),
    "an integer of 5000 digits": ('{"problem": "1", "answer": ' + "9" * 5000 + "}", "not valid JSON"),
    "a raw control character": ('{"problem": "1\x00", "answer": "2"}', "not valid JSON"),
    "a raw tab": ('{"problem": "1\t", "answer": "2"}', "not valid JSON"),
    "half an escape": ('{"problem": "\\u12", "answer": "2"}', "not valid JSON"),
    "the same key twice": ('{"problem": "1", "problem": "2", "answer": "3"}', "'problem' comes twice"),
    "the same key twice within": ('{"problem": "1", "reward_model": {"a": 1, "a": 2}, "answer": 3}', "'a' comes twice"),
    "null": ("null", "expected a JSON object, found NoneType"),
    "a number": ("5", "expected a JSON object, found int"),
    "a string": ('"problem"', "expected a JSON object, found str"),
    "a list": ("[1]", "expected a JSON object, found list"),
    "true": ("true", "expected a JSON object, found bool"),
    "empty object": ("{}", "no prompt (looked for prompt, problem, question; columns: none)"),
    "other columns": ('{"Problem": "1", "Answer": "2"}', "columns: Answer, Problem"),
    "no prompt": ('{"answer": "2"}', "no prompt"),
    "no answer": ('{"problem": "2"}', "no ground truth"),
    "prompt null": ('{"problem": null, "answer": "2"}', "no prompt"),
    "prompt a number": ('{"problem": 5, "answer": "2"}', "wrong type (int)"),
    "prompt true": ('{"problem": true, "answer": "2"}', "wrong type (bool)"),
    "prompt NaN": ('{"problem": NaN, "answer": "2"}', "wrong type (nan)"),
    "prompt an object": ('{"problem": {"text": "1"}, "answer": "2"}', "wrong type (dict)"),
    "prompt empty": ('{"problem": "", "answer": "2"}', "is empty"),
    "prompt blank": ('{"problem": " \\n\\t ", "answer": "2"}', "is empty"),
    "prompt no messages": ('{"prompt": [], "answer": "2"}', "is empty"),
    "messages are strings": ('{"prompt": ["1"], "answer": "2"}', "wrong type (list of str)"),
    "messages are lists": ('{"prompt": [["user", "1"]], "answer": "2"}', "wrong type (list of list)"),
    "a message and a string": ('{"prompt": [{"role": "user", "content": "1"}, "2"], "answer": "2"}', "wrong type"),
    "a message null": ('{"prompt": [null], "answer": "2"}', "wrong type"),
    "no role": ('{"prompt": [{"content": "1"}], "answer": "2"}', "wrong type"),
    "no content": ('{"prompt": [{"role": "user"}], "answer": "2"}', "wrong type"),
    "content null": (json.dumps(_message(None)), "wrong type"),
    "content a number": (json.dumps(_message(5)), "wrong type"),
    "content an object": (json.dumps(_message({"text": "1"})), "wrong type"),
    "content no parts": (json.dumps(_message([])), "wrong type"),
    "content parts of strings": (json.dumps(_message(["1"])), "content in parts (str)"),
    "content an image": (json.dumps(_message([{"type": "image"}])), "content in parts (image)"),
    "content a part without text": (json.dumps(_message([{"type": "text"}])), "content in parts (text)"),
    "content a part of a number": (json.dumps(_message([{"type": "text", "text": 5}])), "content in parts (text)"),
    "content blank parts": (json.dumps(_message([{"type": "text", "text": " "}])), "is empty"),
    "role a number": (json.dumps(_message("1", role=5)), "wrong type"),
    "role a list": (json.dumps(_message("1", role=["user"])), "wrong type"),
    "half a character in the prompt": ('{"problem": "1\\ud83d", "answer": "2"}', "\\ud83d at character 1"),
    "half a character in a message": (json.dumps(_message("\udfff")), "half of a character"),
    "half a character in the answer": ('{"problem": "1", "answer": "\\ud83d"}', "the ground truth in answer has half"),
    "half a character within": (
        '{"problem": "1", "answer": {"a": ["\\ud83d"]}}',
        "the ground truth in answer has half",
    ),
    "half a character in a key": ('{"problem": "1", "answer": {"\\ud83d": 1}}', "the ground truth in answer has half"),
    "answer null": (json.dumps(_truth(None)), "no ground truth"),
    "answer empty": (json.dumps(_truth("")), "the ground truth in answer is empty"),
    "answer blank": (json.dumps(_truth(" \n")), "the ground truth in answer is empty"),
    "answer no list": (json.dumps(_truth([])), "the ground truth in answer is empty"),
    "answer no object": (json.dumps(_truth({})), "the ground truth in answer is empty"),
    "answer NaN": ('{"problem": "1", "answer": NaN}', "wrong type (nan)"),
    "answer infinite": ('{"problem": "1", "answer": 1e999}', "wrong type (inf)"),
    "answer -infinite": ('{"problem": "1", "answer": -Infinity}', "wrong type (-inf)"),
    "answer deep": ('{"problem": "1", "answer": ' + "[" * 300 + "]" * 300 + "}", "more than 100 levels"),
    "extra_info deep": (LINE[:-1] + ', "extra_info": ' + '{"a":' * 300 + "1" + "}" * 301, "more than 100 levels"),
    "too long": ('{"problem": "' + "9" * 5000 + '", "answer": "2"}', "more than data.max_prompt_tokens=200"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_cannot_be_used_is_named(name: str, tmp_path: Path, tokenizer: Any) -> None:
    text, said = ROWS[name]
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{LINE}\n{text}\n")
    with pytest.raises(UserError) as error:
        TaskDataset(_config(file), tokenizer, seed=1)
    assert f"{file}, line 2: " in str(error.value)
    assert said in str(error.value)
    assert len(str(error.value)) < 1000
    # What is wrong with a row is wrong with the row alone.
    skipping = TaskDataset(_config(file, skip_malformed=True), tokenizer, seed=1)
    assert [prompt.text for prompt in skipping.tasks] == ["1+1"]


def _parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path)


def _changed(path: Path, change: Callable[[bytes], bytes]) -> None:
    pq.write_table(pa.Table.from_pylist([GOOD] * 50), path)
    path.write_bytes(change(path.read_bytes()))


def _not_utf8(path: Path) -> None:
    buffers = pa.array([b"\xff\xfe"], pa.binary()).buffers()
    wrong = pa.StringArray.from_buffers(1, buffers[1], buffers[2])
    pq.write_table(pa.table({"problem": wrong, "answer": ["1"]}), path)


def _far_future(path: Path) -> None:
    times = pa.array([2**62], pa.int64()).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"problem": times, "answer": ["1"]}), path)


def _dataset(path: Path, state: Any, arrow: bytes | None = None) -> None:
    path.mkdir()
    (path / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))
    if arrow is not None:
        (path / "a.arrow").write_bytes(arrow)


def _two_columns(path: Path) -> None:
    _parquet(
        path,
        pa.Table.from_arrays([pa.array(["1"]), pa.array(["2"]), pa.array(["3"])], ["problem", "problem", "answer"]),
    )


# Name of the path: (what makes it, what the message says).
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nowhere.jsonl": (lambda path: None, "no such file"),
    "empty.jsonl": (lambda path: path.write_text(""), "the file has no rows"),
    "blank.jsonl": (lambda path: path.write_text("\n \n\t\n"), "the file has no rows"),
    "binary.jsonl": (lambda path: path.write_bytes(bytes(range(256))), "not UTF-8 text"),
    "utf16.jsonl": (lambda path: path.write_bytes(LINE.encode("utf-16")), "not UTF-8 text"),
    "latin1.jsonl": (lambda path: path.write_bytes(b'{"problem": "\xe9"}'), "not UTF-8 text"),
    "gzip.jsonl": (lambda path: path.write_bytes(gzip.compress(LINE.encode() * 9)), "compressed: gzip; unpack it"),
    "parquet.jsonl": (lambda path: _changed(path, lambda b: b), "it is a parquet file: call it .parquet"),
    "array.json": (lambda path: path.write_text(f"[{LINE}, {LINE}"), "not a valid JSON array"),
    "deep.json": (lambda path: path.write_text("[" * 100000), "nested too deeply"),
    "empty_array.json": (lambda path: path.write_text("[]"), "the file has no rows"),
    "array_of_numbers.json": (lambda path: path.write_text("[1, 2]"), "items: expected a JSON object, found int"),
    "pretty.json": (lambda path: path.write_text(json.dumps(GOOD, indent=2)), "not valid JSON"),
    "object_of_lists.json": (lambda path: path.write_text('{"problem": ["1"], "answer": ["2"]}'), "wrong type"),
    "empty.parquet": (lambda path: path.write_bytes(b""), "not a readable parquet file"),
    "cut.parquet": (lambda path: _changed(path, lambda b: b[: len(b) // 2]), "not a readable parquet file"),
    "magic.parquet": (lambda path: path.write_bytes(b"PAR1" + bytes(100) + b"PAR1"), "not a readable parquet file"),
    "flipped.parquet": (lambda path: _changed(path, lambda b: b[:4] + bytes(60) + b[64:]), "not a readable parquet"),
    "text.parquet": (lambda path: path.write_text(LINE), "not a readable parquet file"),
    "gzip.parquet": (lambda path: path.write_bytes(gzip.compress(LINE.encode())), "compressed: gzip; unpack it"),
    "no_rows.parquet": (lambda path: _parquet(path, pa.table({"problem": pa.array([], pa.string())})), "has no rows"),
    "no_columns.parquet": (lambda path: _parquet(path, pa.table({"x": ["1"]})), "row 0: no prompt"),
    "not_utf8.parquet": (_not_utf8, "not_utf8.parquet"),
    "far_future.parquet": (_far_future, "far_future.parquet"),
    "two_columns.parquet": (_two_columns, "two_columns.parquet"),
    "dates.parquet": (
        lambda path: _parquet(path, pa.table({"problem": [datetime.date(2026, 1, 1)], "answer": ["1"]})),
        "row 0: the prompt in problem is of the wrong type (date)",
    ),
    "bytes.parquet": (
        lambda path: _parquet(path, pa.table({"problem": [b"1"], "answer": ["1"]})),
        "wrong type (bytes)",
    ),
    "truth_bytes.parquet": (
        lambda path: _parquet(path, pa.table({"problem": ["1"], "answer": [b"1"]})),
        "wrong type (bytes)",
    ),
    "folder.jsonl": (lambda path: path.mkdir(), "not a directory that datasets' save_to_disk wrote"),
    "pipe.jsonl": (os.mkfifo, "a pipe, not a file"),
    "loop.jsonl": (lambda path: path.symlink_to(path), "a symbolic link that leads nowhere"),
    "dangling.parquet": (lambda path: path.symlink_to("gone"), "a symbolic link that leads nowhere (gone)"),
    "state_is_a_list": (lambda path: _dataset(path, []), "save_to_disk"),
    "state_is_cut": (lambda path: _dataset(path, "{"), "save_to_disk"),
    "state_is_deep": (lambda path: _dataset(path, "[" * 100000), "nested too deeply"),
    "state_names_nothing": (lambda path: _dataset(path, {}), "save_to_disk"),
    "state_names_a_number": (lambda path: _dataset(path, {"_data_files": 5}), "save_to_disk"),
    "state_names_no_file": (lambda path: _dataset(path, {"_data_files": [{"filename": "b"}]}), "save_to_disk"),
    "state_names_no_files": (lambda path: _dataset(path, {"_data_files": []}), "the file has no rows"),
    "arrow_is_garbage": (
        lambda path: _dataset(path, {"_data_files": [{"filename": "a.arrow"}]}, b"x" * 50),
        "save_to_",
    ),
    "arrow_is_empty": (lambda path: _dataset(path, {"_data_files": [{"filename": "a.arrow"}]}, b""), "save_to_disk"),
    "reordered": (lambda path: _dataset(path, {"_data_files": [], "_indices_files": ["i"]}), "flatten_indices()"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_used_is_named(name: str, tmp_path: Path, tokenizer: Any) -> None:
    make, said = FILES[name]
    make(tmp_path / name)
    with pytest.raises(UserError) as error:
        TaskDataset(_config(tmp_path / name), tokenizer, seed=1)
    assert str(tmp_path / name) in str(error.value)
    assert said in str(error.value)
    assert len(str(error.value)) < 1500
    # The warm start reads the same way.
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        WarmStartPairs(tmp_path / name, tokenizer, 100)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + LINE.encode(),
        LINE.encode() + b"\r\n" + LINE.encode() + b"\r\n",
        b"\n\n" + LINE.encode() + b"\n\n",
        json.dumps(GOOD | {"note": "\u2028\u2029\x85"}, ensure_ascii=False).encode(),
        json.dumps(GOOD | {"note": "\ud800", "extra_info": None, "data_source": "\ud800"}).encode(),
        b"  [" + LINE.encode() + b"]",
        json.dumps({"prompt": [{"role": "user", "content": "1+1", "name": None}], "answer": "2"}).encode(),
        json.dumps({"problem": "1+1", "answer": int("9" * 4000)}).encode(),
    ],
)
def test_what_is_odd_and_can_be_used_is_used(content: bytes, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    data = TaskDataset(_config(tmp_path / "rows.jsonl"), tokenizer, seed=1)
    assert {prompt.text for prompt in data.tasks} == {"1+1"}
    for prompt in data.tasks:
        prompt.data_source.encode()


def test_characters_that_the_tokenizer_does_not_know_are_said(tmp_path: Path, tokenizer: Any) -> None:
    rows = [GOOD, GOOD | {"problem": "1 \u2603"}, GOOD | {"problem": "_"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = TaskDataset(_config(tmp_path / "rows.jsonl"), tokenizer, seed=1).report.lines()
    assert any(line.startswith("1 prompts have characters") and line.endswith("line 2") for line in lines)


def test_a_folder_called_key_is_value_is_no_column(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "difficulty=3" / "train.parquet"
    file.parent.mkdir()
    pq.write_table(pa.Table.from_pylist([GOOD | {"difficulty": "hard"}]), file)
    assert TaskDataset(_config(file), tokenizer, seed=1)[0].text == "1+1"


def _config(file: Path, **values: Any) -> DataConfig:
    return DataConfig(train_files=[file], max_prompt_tokens=200, **values)
