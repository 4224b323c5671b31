"""Prompts from real files and a real tokenizer; everything that is wrong with the data in one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_entropic.config.run import DataConfig
from megatron_entropic.data import PromptForm, TaskDataset, WarmStartPairs, load_tokenizer


def config(*files: Path, **values: Any) -> DataConfig:
    return DataConfig(**({"train_files": list(files), "max_prompt_tokens": 30} | values))


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def verl_row(number: int) -> dict[str, Any]:
    return {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": f"{number},2>03:"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": json.dumps({"numbers": [number, 2], "target": 3})},
        "extra_info": {"index": number},
    }


def test_the_verl_layout_from_parquet(tmp_path: Path, tokenizer: Any) -> None:
    dataset = TaskDataset(config(parquet(tmp_path / "a.parquet", *map(verl_row, range(5)))), tokenizer, seed=1)
    assert len(dataset) == 5
    prompt = dataset[3]
    assert (prompt.index, prompt.text, prompt.data_source) == (3, "3,2>03:", "countdown")
    assert tokenizer.decode(prompt.tokens) == "3,2>03:"
    assert json.loads(prompt.ground_truth) == {"numbers": [3, 2], "target": 3}
    assert prompt.extra_info == {"index": 3}


def test_the_plain_layout_and_several_files(tmp_path: Path, tokenizer: Any) -> None:
    first = jsonl(tmp_path / "a.jsonl", {"problem": "1+1", "answer": "2"}, {"question": "1+2", "answer": 3})
    second = tmp_path / "b.json"
    second.write_text(json.dumps([{"problem": "2+2", "answer": "4"}]))
    third = parquet(tmp_path / "c.parquet", {"problem": "0", "answer": "0"})
    dataset = TaskDataset(config(first, second, third), tokenizer, seed=1)
    assert [prompt.text for prompt in dataset] == ["1+1", "1+2", "2+2", "0"]
    assert [prompt.ground_truth for prompt in dataset] == ["2", 3, "4", "0"]
    assert [prompt.index for prompt in dataset] == [0, 1, 2, 3]
    assert [prompt.data_source for prompt in dataset] == ["a", "a", "b", "c"]


def test_steps_take_prompts_by_seed_and_step_alone(tmp_path: Path, tokenizer: Any) -> None:
    file = parquet(tmp_path / "a.parquet", *map(verl_row, range(7)))
    dataset = TaskDataset(config(file), tokenizer, seed=5)
    steps = [[prompt.index for prompt in dataset.at_step(step, 3)] for step in range(1, 8)]
    flat = [index for step in steps for index in step]
    assert [sorted(flat[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    again = TaskDataset(config(file), tokenizer, seed=5)
    assert [prompt.index for prompt in again.at_step(5, 3)] == steps[4]
    unshuffled = TaskDataset(config(file, order="as_stored"), tokenizer, seed=5)
    assert [prompt.index for prompt in unshuffled.at_step(3, 3)] == [6, 0, 1]


def test_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    file = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": [{"role": "system", "content": "add"}, {"role": "user", "content": "1+1"}], "answer": "2"},
        {"prompt": "1+2", "answer": "3"},
    )
    with_template = TaskDataset(config(file, apply_chat_template=True, max_prompt_tokens=40), tokenizer, seed=1)
    assert [p.text for p in with_template] == [
        "<system|add<user|1+1<assistant|",
        "<user|1+2<assistant|",
    ]
    plain = TaskDataset(config(file), tokenizer, seed=1)
    assert [p.text for p in plain] == ["add\n\n1+1", "1+2"]


def test_a_chat_template_that_is_not_there(tmp_path: Path, tokenizer_dir: Path) -> None:
    bare = load_tokenizer(tokenizer_dir)
    bare.chat_template = None
    file = jsonl(tmp_path / "a.jsonl", {"problem": "1", "answer": "1"})
    with pytest.raises(ValueError, match="no chat template"):
        TaskDataset(config(file, apply_chat_template=True), bare, seed=1)


def test_everything_wrong_in_one_error(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 is not enough")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "\xe9"}')
    lines = [
        '{"problem": "1", "answer": "1"}',
        '{"problem": ',
        "[1]",
        '{"answer": "1"}',
        '{"problem": "1"}',
        '{"problem": "", "answer": 1}',
        '{"prompt": 5, "answer": NaN}',
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    names = ["missing.parquet", "broken.parquet", "empty.jsonl", "latin.jsonl", "lines.jsonl"]
    with pytest.raises(ValueError) as caught:
        TaskDataset(config(*[tmp_path / name for name in names]), tokenizer, seed=1)
    message = str(caught.value)
    for part in (
        "11 problem(s)",
        "missing.parquet: no such file",
        "broken.parquet: not a readable parquet file",
        "empty.jsonl: the file has no rows",
        "latin.jsonl: not UTF-8 text",
        "lines.jsonl, line 2: not valid JSON",
        "lines.jsonl, line 3: expected a JSON object, found list",
        "lines.jsonl, line 4: no prompt (looked for prompt, problem, question; columns: answer)",
        "lines.jsonl, line 5: no ground truth",
        "lines.jsonl, line 6: the prompt in problem is empty",
        "lines.jsonl, line 7: the prompt in prompt is of the wrong type (int): expected a string, or messages",
        "lines.jsonl, line 7: the ground truth in answer is of the wrong type (nan)",
    ):
        assert part in message, part


def test_many_bad_rows_are_counted_and_none_of_them_hides_another_reason(tmp_path: Path, tokenizer: Any) -> None:
    file = jsonl(tmp_path / "a.jsonl", *[{"text": "x"}] * 100, {"problem": "1", "answer": " "})
    with pytest.raises(ValueError) as caught:
        TaskDataset(config(file), tokenizer, seed=1)
    message = str(caught.value)
    assert "201 problem(s)" in message
    assert "100 lines: no prompt" in message
    assert "lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 90 more" in message
    assert "line 101: the ground truth in answer is empty" in message


def test_prompts_over_the_budget(tmp_path: Path, tokenizer: Any) -> None:
    file = jsonl(tmp_path / "a.jsonl", *[{"problem": "1" * n, "answer": "1"} for n in (29, 30, 31, 60)])
    with pytest.raises(ValueError) as caught:
        TaskDataset(config(file), tokenizer, seed=1)
    assert "2 lines: more than data.max_prompt_tokens=30: lines 3 (31 tokens), 4 (60 tokens)" in str(caught.value)
    dataset = TaskDataset(config(file, too_long="drop"), tokenizer, seed=1)
    assert (len(dataset), dataset.dropped) == (2, 2)
    assert f"the longest has 60 tokens): {file}, line 3 (31), {file}, line 4 (60)" in "\n".join(dataset.report.lines())
    with pytest.raises(ValueError, match=r"no prompt is left(.|\n)*longer than data\.max_prompt_tokens: 4"):
        TaskDataset(config(file, too_long="drop", max_prompt_tokens=3), tokenizer, seed=1)


def test_warm_start_pairs_end_in_one_end_of_sequence(tmp_path: Path, tokenizer: Any) -> None:
    file = parquet(
        tmp_path / "pairs.parquet",
        {"prompt": "1,2>03:", "response": "1+2"},
        {"prompt": "2,2>04:", "response": "2+2$"},
    )
    pairs = WarmStartPairs(file, tokenizer, 11)
    assert len(pairs) == 2
    for index, (prompt, response) in enumerate([("1,2>03:", "1+2$"), ("2,2>04:", "2+2$")]):
        assert [tokenizer.decode(tokens) for tokens in pairs[index]] == [prompt, response]
    with pytest.raises(ValueError, match=r"2 rows: more than the budget of 10 tokens: rows 0 \(7 \+ 4 tokens\)"):
        WarmStartPairs(file, tokenizer, 10)


def test_warm_start_prompts_equal_those_of_training(tmp_path: Path, tokenizer: Any) -> None:
    row = {"problem": "1+1", "answer": "2", "response": "2"}
    file = jsonl(tmp_path / "a.jsonl", row)
    dataset = TaskDataset(config(file, apply_chat_template=True), tokenizer, seed=1)
    pairs = WarmStartPairs(file, tokenizer, 100, form=PromptForm(apply_chat_template=True))
    assert pairs[0][0] == dataset[0].tokens.tolist()


def test_warm_start_rows_without_a_response(tmp_path: Path, tokenizer: Any) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"prompt": "1"}, {"prompt": "1", "response": ""}, {"response": "1"})
    with pytest.raises(ValueError, match=r"3 problem\(s\)"):
        WarmStartPairs(file, tokenizer, 100)


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    inner = Tokenizer(models.WordLevel({"a": 0, "_": 1}, unk_token="_"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="_").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)
