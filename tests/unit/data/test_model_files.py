"""Tokenizer, configuration and embedding of a model directory that do not agree are found at start, with what to do."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_entropic.config.run import DataConfig
from megatron_entropic.data import TaskDataset, WarmStartPairs, load_checked_tokenizer, load_tokenizer
from megatron_entropic.data.tokenizer import render_prompts
from megatron_entropic.errors import UserError

DATE_TEMPLATE = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
CALL_TEMPLATE = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls[0] }}{% endif %}{{ m['content'] }}{% endfor %}"
)


@pytest.fixture
def model(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """A model directory as far as the tokenizer is concerned, whose files agree."""
    directory = Path(shutil.copytree(tokenizer_dir, tmp_path / "model"))
    _write(directory, "config.json", vocab_size=len(load_tokenizer(directory)), eos_token_id=_end(directory))
    _write(directory, "generation_config.json", eos_token_id=_end(directory))
    return directory


def _end(directory: Path) -> int:
    return int(load_tokenizer(directory).eos_token_id)


def _write(directory: Path, file: str, **values: Any) -> None:
    (directory / file).write_text(json.dumps(values))


def _tokenizer_json(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _append_end(directory: Path) -> None:
    """As add_eos_token=true does in a fast tokenizer."""
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "$", "type_id": 0}}]
    processor = {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [sequence[0], {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"$": {"id": "$", "ids": [_end(directory)], "tokens": ["$"]}},
    }
    _tokenizer_json(directory, lambda content: content.update(post_processor=processor))


def _rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _config(*files: Path, **values: Any) -> DataConfig:
    return DataConfig(train_files=list(files), **{"max_prompt_tokens": 60, **values})


def test_files_that_agree_pass(model: Path) -> None:
    assert load_checked_tokenizer(model).eos_token == "$"
    _write(model, "generation_config.json", eos_token_id=[0, _end(model)])
    assert load_checked_tokenizer(model).eos_token == "$"


@pytest.mark.parametrize(
    ("config", "generation", "said"),
    [
        (
            {"eos_token_id": 3},
            {"eos_token_id": 4},
            "run on past it: set eos_token_id in generation_config.json to [3, 4",
        ),
        ({}, {}, "name other end tokens (eos_token_id: none)"),
        ({"eos_token_id": "x"}, {}, "eos_token_id 'x' is no token id"),
        ({"eos_token_id": [True]}, {}, "is no token id"),
        ({"eos_token_id": [-1]}, {}, "is no token id"),
        ({"eos_token_id": 99999}, {}, "the end token 99999 is beyond the embedding"),
    ],
)
def test_end_tokens_that_differ_are_refused_with_what_to_do(
    model: Path, config: dict[str, Any], generation: dict[str, Any], said: str
) -> None:
    _write(model, "config.json", vocab_size=len(load_tokenizer(model)), **config)
    _write(model, "generation_config.json", **generation)
    with pytest.raises(UserError) as error:
        load_checked_tokenizer(model)
    assert said in str(error.value)
    assert str(model) in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100000, "\x00"])
def test_a_generation_config_that_is_none_is_named(model: Path, content: str) -> None:
    (model / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        load_checked_tokenizer(model)


def test_a_tokenizer_that_appends_the_end_of_sequence_leaves_prompts_open(model: Path, tmp_path: Path) -> None:
    _append_end(model)
    tokenizer = load_tokenizer(model)
    assert tokenizer("1")["input_ids"][-1] == tokenizer.eos_token_id
    data = TaskDataset(_config(_rows(tmp_path / "a.jsonl", {"problem": "1+2", "answer": "3"})), tokenizer, seed=1)
    assert tokenizer.decode(data[0].tokens) == "1+2"
    assert any("appends '$' to every text: left off" in line for line in data.report.lines())
    pairs = WarmStartPairs(_rows(tmp_path / "w.jsonl", {"prompt": "1+2", "response": "3"}), tokenizer, 40)
    assert [tokenizer.decode(part) for part in pairs[0]] == ["1+2", "3$"]
    # What the text itself ends with stays.
    (own,) = render_prompts(["1+2$"], tokenizer, apply_chat_template=False)
    assert tokenizer.decode(own.tokens) == "1+2$"


def test_ids_beyond_the_embedding_are_refused_with_their_rows(model: Path, tmp_path: Path) -> None:
    size = len(load_tokenizer(model))
    token = {"id": size, "content": "#", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    _tokenizer_json(model, lambda content: content["added_tokens"].append(token | flags))
    tokenizer = load_tokenizer(model)
    rows = [{"problem": "1+2", "answer": "3"}, {"problem": "1#2", "answer": "3"}]
    file = _rows(tmp_path / "a.jsonl", *rows)
    with pytest.raises(UserError, match=rf"line 2: .*beyond the model's embedding of {size} rows.*{size} '#'"):
        TaskDataset(_config(file), tokenizer, seed=1)
    assert len(TaskDataset(_config(file, skip_malformed=True), tokenizer, seed=1)) == 1
    pairs = _rows(tmp_path / "w.jsonl", {"prompt": "1", "response": "2"}, {"prompt": "1", "response": "#"})
    with pytest.raises(UserError, match="line 2: the response cannot be used"):
        WarmStartPairs(pairs, tokenizer, 40)


def test_a_chat_template_with_the_date_needs_one_that_stays(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text(DATE_TEMPLATE)
    tokenizer, file = load_tokenizer(model), _rows(tmp_path / "a.jsonl", {"problem": "1+2", "answer": "3"})
    with pytest.raises(UserError, match=r"line 1: .*today's date.*data\.template_date=2"):
        TaskDataset(_config(file, apply_chat_template=True), tokenizer, seed=1)
    chosen = _config(file, apply_chat_template=True, template_date="2026-11-28")
    assert TaskDataset(chosen, tokenizer, seed=1)[0].text == "28 Nov 20261+2"
    day = datetime.date(2025, 1, 2)
    (other,) = render_prompts(["1+2"], tokenizer, apply_chat_template=True, template_date=day)
    assert other.text == "02 Jan 20251+2"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content.nothing.more }}", "UndefinedError"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "SecurityError"),
        ("{% for i in range(100000000) %}x{% endfor %}", "OverflowError"),
        ("{{ messages | sum }}", "TypeError"),
    ],
)
def test_a_chat_template_that_refuses_is_one_error_with_its_rows(
    model: Path, tmp_path: Path, template: str, said: str
) -> None:
    (model / "chat_template.jinja").write_text(template)
    file = _rows(tmp_path / "a.jsonl", *[{"problem": f"{i}", "answer": "3"} for i in range(3)])
    with pytest.raises(UserError) as error:
        TaskDataset(_config(file, apply_chat_template=True), load_tokenizer(model), seed=1)
    assert "3 lines: the prompt cannot be used: the chat template does not take it" in str(error.value)
    assert said in str(error.value)


def test_fields_that_parquet_filled_with_null_are_no_fields(model: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (model / "chat_template.jinja").write_text(CALL_TEMPLATE)
    call = {"role": "assistant", "content": None, "tool_calls": ["2"]}
    rows = [
        {"prompt": [{"role": "user", "content": "1"}], "answer": "1"},
        {"prompt": [call, {"role": "user", "content": "3"}], "answer": "1"},
    ]
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(pa.string()))])
    schema = pa.schema([("prompt", pa.list_(message)), ("answer", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet")
    data = TaskDataset(_config(tmp_path / "a.parquet", apply_chat_template=True), load_tokenizer(model), seed=1)
    assert [prompt.text for prompt in data.tasks] == ["1", "23"]


def test_content_in_parts_of_text_is_joined_and_anything_else_refused(model: Path, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2"}]
    tokenizer = load_tokenizer(model)
    file = _rows(tmp_path / "a.jsonl", {"prompt": [{"role": "user", "content": parts}], "answer": "3"})
    assert TaskDataset(_config(file, prompt_suffix="?"), tokenizer, seed=1)[0].text == "1+2?"
    image = [{"type": "image_url", "image_url": {"url": "x"}}, *parts]
    file = _rows(tmp_path / "b.jsonl", {"prompt": [{"role": "user", "content": image}], "answer": "3"})
    with pytest.raises(UserError, match=r"line 1: .*parts \(image_url, text\): only text"):
        TaskDataset(_config(file), tokenizer, seed=1)


def test_a_tokenizer_that_is_code_is_neither_run_nor_asked_about(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own_tokenizer.OwnTokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "own_tokenizer.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")

    def asked(*_: object) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(UserError, match="is never run here"):
        load_tokenizer(model)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[" * 100000, '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_one_clear_error(model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="its tokenizer cannot be loaded") as error:
        load_tokenizer(model)
    assert len(str(error.value)) < 700
