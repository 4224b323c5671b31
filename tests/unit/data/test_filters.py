"""Malformed rows, copies, benchmark problems, pass rates, mixtures: what is reported, what is left out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_entropic.config.run import DataConfig, RewardConfig
from megatron_entropic.data import TaskDataset
from megatron_entropic.data.filters import find_duplicates, find_overlap
from megatron_entropic.data.order import MixedOrder, shuffled
from megatron_entropic.rewards import RewardScorer


def config(*files: Path, **values: Any) -> DataConfig:
    return DataConfig(**({"train_files": list(files), "max_prompt_tokens": 200} | values))


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problem(text: str, answer: Any = "1") -> dict[str, Any]:
    return {"problem": text, "answer": answer}


def save_dataset(directory: Path, *shards: list[dict[str, Any]]) -> Path:
    """What `datasets.Dataset.save_to_disk` writes: Arrow streams, and their names in state.json."""
    directory.mkdir()
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(directory / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (directory / "dataset_info.json").write_text("{}")
    return directory


def test_a_saved_datasets_directory(tmp_path: Path, tokenizer: Any) -> None:
    saved = save_dataset(tmp_path / "saved", [problem("a"), problem("b")], [problem("c"), problem("")])
    dataset = TaskDataset(config(saved, skip_malformed=True), tokenizer, seed=1)
    assert [prompt.text for prompt in dataset.tasks] == ["a", "b", "c"]
    assert dataset.report.skipped_lines == [f"{saved}, row 3: the prompt in problem is empty"]
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    save_dataset(splits / "train", [problem("a")])
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"splits train: name the folder of one(.|\n)*bare: not a directory that"):
        TaskDataset(config(splits, tmp_path / "bare"), tokenizer, seed=1)


def test_columns_by_name_system_prompt_and_suffix(tmp_path: Path, tokenizer: Any) -> None:
    file = jsonl(
        tmp_path / "a.jsonl",
        {"inner": {"ask": "one", "key": "1"}, "answer": "a long solution"},
        {"inner": {"ask": [{"role": "system", "content": "own"}, {"role": "user", "content": "two"}], "key": "2"}},
    )
    form = {
        "prompt_key": "inner.ask",
        "answer_key": "inner.key",
        "system_prompt": "be brief",
        "prompt_suffix": " think",
    }
    plain = TaskDataset(config(file, **form), tokenizer, seed=1)
    assert [p.text for p in plain.tasks] == ["be brief\n\none think", "own\n\ntwo think"]
    assert [p.ground_truth for p in plain.tasks] == ["1", "2"]
    chat = TaskDataset(config(file, apply_chat_template=True, **form), tokenizer, seed=1)
    assert [p.text for p in chat.tasks] == [
        "<system|be brief<user|one think<assistant|",
        "<system|own<user|two think<assistant|",
    ]
    other = jsonl(tmp_path / "b.jsonl", problem("three", "3"))
    with pytest.raises(ValueError, match=r"no ground truth \(looked for inner\.key; columns: answer, problem\)"):
        TaskDataset(config(other, **form), tokenizer, seed=1)
    benchmark = TaskDataset(config(other, **form), tokenizer, seed=1, other_columns=True)
    assert benchmark.tasks[0].ground_truth == "3"


def test_malformed_rows_are_told_together_or_skipped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        problem("good", r"\frac{1}{2}"),
        {"answer": "1"},
        problem("", "1"),
        {"problem": 7, "answer": "1"},
        problem("no truth", None),
        problem("odd", r"1+\frac{\}{2}"),
        problem("empty", {"answer": ""}),
        problem("also good", "12"),
    ]
    file = jsonl(tmp_path / "a.jsonl", *rows)
    with RewardScorer(RewardConfig(verifier="math", workers=1)) as scorer:
        with pytest.raises(ValueError) as caught:
            TaskDataset(config(file), tokenizer, seed=1, check_truths=scorer.truth_problems)
        (tmp_path / "broken.parquet").write_bytes(b"PAR1")
        broken = config(file, tmp_path / "broken.parquet", skip_malformed=True)
        with pytest.raises(ValueError, match=r"broken\.parquet: not a readable parquet file"):
            TaskDataset(broken, tokenizer, seed=1)
        skipping = config(file, skip_malformed=True)
        dataset = TaskDataset(skipping, tokenizer, seed=1, check_truths=scorer.truth_problems)
        nothing = jsonl(tmp_path / "b.jsonl", *rows[1:4])
        with pytest.raises(ValueError, match=r"no prompt is left(.|\n)*skipped as malformed: 3 findings"):
            TaskDataset(config(nothing, skip_malformed=True), tokenizer, seed=1)
    message = str(caught.value)
    for part in (
        "6 problem(s)",
        "line 2: no prompt",
        "line 3: the prompt in problem is empty",
        "line 4: the prompt in problem is of the wrong type (int)",
        "line 5: no ground truth",
        "lines: the verifier cannot use the ground truth: lines 6 (as an answer it is judged wrong), 7 (the ground",
    ):
        assert part in message, part
    assert [prompt.text for prompt in dataset.tasks] == ["good", "also good"]
    assert [prompt.index for prompt in dataset.tasks] == [0, 7], "an index is a row, whatever is skipped"
    assert "skipped as malformed: 6 findings" in dataset.report.lines()


def test_countdown_truths_are_looked_at(tmp_path: Path) -> None:
    with RewardScorer(RewardConfig(verifier="countdown")) as scorer:
        good, bad = {"numbers": [1, 2], "target": 3}, {"numbers": [1, 2]}
        assert scorer.truth_problems([good, bad])[0] is None
        assert "expected a ground truth with numbers and target" in str(scorer.truth_problems([good, bad])[1])


LONG = "find the smallest number of stones that fit in a box of nine by nine if no two may touch"


def test_copies_and_benchmark_problems(tmp_path: Path, tokenizer: Any) -> None:
    rows = [problem("what is 1+1", "2"), problem("What  is 1+1\n", "2"), problem("what is 1+1", "3"), problem("other")]
    rows += [problem("Now " + LONG + " ever"), problem("sum of two")]
    file = jsonl(tmp_path / "a.jsonl", *rows)
    benchmarks = {"own": ["Other", LONG + " again"], "none": ["nothing of the kind"]}
    kept = TaskDataset(config(file), tokenizer, seed=1, benchmarks=benchmarks)
    assert len(kept) == 6
    assert "2 copies of earlier problems, 1 of them with another ground truth (kept" in kept.report.copies[0]
    assert "own: 1 training problems are in it, 1 more share 13 words" in kept.report.copies[1]
    assert len(kept.report.copies) == 2
    dropping = config(file, duplicates="drop", benchmark_overlap="drop")
    dropped = TaskDataset(dropping, tokenizer, seed=1, benchmarks=benchmarks)
    assert [prompt.index for prompt in dropped.tasks] == [0, 5]
    assert dropped.problems == ["what is 1+1", "sum of two"]


def test_words_that_many_problems_share_are_boilerplate() -> None:
    preface = "solve the following problem step by step and put the answer in a box please "
    texts = [preface + f"number {number}" for number in range(50)]
    assert not find_overlap(texts, {"b": [preface + "something else"]}, 13)["b"].positions
    assert find_overlap(texts[:5], {"b": [preface + "something else"]}, 13)["b"].ngram == [0, 1, 2, 3, 4]
    assert find_duplicates(["a", "b", "A "], ["1", "2", 1]).contradictions == []


def test_recorded_pass_rates(tmp_path: Path, tokenizer: Any) -> None:
    rates = {"a": [0, 0], "b": [1, 0], "c": [1, 1]}
    rows = [{"prompt": text, "reward": float(r)} for text, rewards in rates.items() for r in rewards]
    recorded = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), recorded)
    file = jsonl(tmp_path / "a.jsonl", *map(problem, "abcd"))
    some = config(file, pass_rates=recorded, pass_rate_min=0.1, pass_rate_max=0.9)
    dataset = TaskDataset(some, tokenizer, seed=1)
    assert [prompt.text for prompt in dataset.tasks] == ["b", "d"]
    assert dataset.report.pass_rates == (3, 2)
    with pytest.raises(ValueError, match="none of its prompts is one of the training prompts"):
        TaskDataset(some.model_copy(update={"prompt_suffix": "!"}), tokenizer, seed=1)
    with pytest.raises(ValueError, match="not the stored responses"):
        TaskDataset(some.model_copy(update={"pass_rates": file}), tokenizer, seed=1)


def record_rates(path: Path, rates: dict[str, float]) -> Path:
    """What `evaluate` stores, as far as it is read: ten responses to each prompt."""
    rows = [{"prompt": text, "reward": float(k < 10 * rate)} for text, rate in rates.items() for k in range(10)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_a_curriculum_of_recorded_pass_rates(tmp_path: Path, tokenizer: Any) -> None:
    names = [f"{letter}{number}" for letter in "abcd" for number in range(10)]
    rates = {name: (number % 10) / 10 for number, name in enumerate(names)}
    files = [jsonl(tmp_path / f"{half}.jsonl", *map(problem, names[half::2])) for half in (0, 1)]
    recorded = record_rates(tmp_path / "train.parquet", rates)
    easy_first = config(*files, pass_rates=recorded, order="easy_to_hard", order_blur=0.1)

    def asked(steps: range, **values: Any) -> list[list[str]]:
        dataset = TaskDataset(easy_first.model_copy(update=values), tokenizer, seed=3)
        return [[prompt.text for prompt in dataset.at_step(step, 8)] for step in steps]

    first, second = asked(range(1, 6)), asked(range(6, 11))
    means = [sum(rates[text] for text in step) / len(step) for step in first]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[-1] > 0.6
    assert first != second, "another epoch, another blur"
    assert asked(range(4, 6)) == first[3:], "resumed"
    limited = asked(range(1, 5), pass_rate_min=0.2)
    assert sorted(text for step in limited for text in step) == [text for text in names if rates[text] >= 0.2]
    mixed = TaskDataset(easy_first.model_copy(update={"file_weights": [1, 1]}), tokenizer, seed=3)
    for file in (0, 1):
        own = [p for step in range(1, 5) for p in mixed.at_step(step, 8) if (p.index < 20) == (file == 0)]
        assert rates[own[0].text] > 0.7
        assert rates[own[-1].text] < 0.4
    asked_before = {prompt.index for prompt in mixed.at_step(1, 8)}
    others = [rates[prompt.text] for prompt in mixed.replacements(1, 0, 16, asked_before)]
    assert min(others) < 0.3 < 0.6 < max(others), "replacements are shuffled"


def test_mixtures_hold_their_shares_and_resume_anywhere(tmp_path: Path, tokenizer: Any) -> None:
    big = jsonl(tmp_path / "big.jsonl", *[problem(f"a{n}") for n in range(30)])
    small = jsonl(tmp_path / "small.jsonl", *[problem(f"b{n} ") for n in range(3)])
    mixed = config(big, small, file_weights=[1, 3])
    dataset = TaskDataset(mixed, tokenizer, seed=5)
    steps = [[prompt.index for prompt in dataset.at_step(step, 16)] for step in range(1, 21)]
    assert all(3 <= sum(index < 30 for index in step) <= 5 for step in steps)
    flat = [index for step in steps for index in step]
    assert max(Counter(index for index in flat if index < 30).values()) <= 3, "each file is gone through in epochs"
    again = TaskDataset(mixed, tokenizer, seed=5)
    assert [prompt.index for prompt in again.at_step(13, 16)] == steps[12]
    other = TaskDataset(mixed, tokenizer, seed=6)
    assert [prompt.index for prompt in other.at_step(1, 16)] != steps[0]
    with pytest.raises(ValueError, match=r"file_weights: no prompt is left of .*small"):
        TaskDataset(mixed.model_copy(update={"max_prompt_tokens": 2, "too_long": "drop"}), tokenizer, seed=5)


def test_the_mixed_order_is_the_same_on_every_machine_and_version() -> None:
    order = MixedOrder([[0, 1, 2], [3, 4]], [2, 1], lambda rows: shuffled(len(rows)), seed=1)
    assert order.rows(0, 9) == order.rows(0, 4) + order.rows(4, 5)
    assert order.rows(3, 6) == [3, 2, 1, 3, 0, 2]


def test_replacements_are_a_function_of_step_and_round(tmp_path: Path, tokenizer: Any) -> None:
    files = [jsonl(tmp_path / f"{k}.jsonl", *[problem(f"{k}{n}") for n in range(12)]) for k in "ab"]
    for weights in (None, [1, 2]):
        dataset = TaskDataset(config(*files, file_weights=weights), tokenizer, seed=2)
        asked = {prompt.index for prompt in dataset.at_step(3, 8)}
        first = [prompt.index for prompt in dataset.replacements(3, 0, 4, asked)]
        assert len(set(first)) == 4
        assert not asked & set(first)
        again = TaskDataset(config(*files, file_weights=weights), tokenizer, seed=2)
        again.replacements(2, 5, 8, set())
        assert [prompt.index for prompt in again.replacements(3, 0, 4, asked)] == first
        assert [prompt.index for prompt in again.replacements(3, 1, 4, asked)] != first
        assert [prompt.index for prompt in again.replacements(4, 0, 4, asked)] != first
    assert len(dataset.replacements(3, 0, 99, asked)) <= 16
    assert dataset.replacements(1, 0, 4, set(range(24))) == []
