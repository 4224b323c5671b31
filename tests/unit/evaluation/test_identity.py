"""What an evaluation's responses depend on is stored with them, and a change is named; benchmarks of every layout."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_entropic.commands.evaluate import _apart_at_commas
from megatron_entropic.config.run import Config, DataConfig
from megatron_entropic.data import TaskDataset, load_tokenizer
from megatron_entropic.errors import UserError
from megatron_entropic.evaluation.generations import Generation, write_generations
from megatron_entropic.evaluation.store import generations_path
from megatron_entropic.training.evaluator import Evaluator, model_identity

ROWS = [{"problem": "1+1", "answer": "2"}, {"problem": "1+2", "answer": "3"}]
MODEL = {"files_sha256": "x"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    characters = "0123456789+$_ abcdefghijklmnopqrstuvwxyz<|>"
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="_"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="$", unk_token="_").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return tmp_path / "model"


def _jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _saved(directory: Path, rows: list[dict[str, str]], fingerprint: str = "a") -> Path:
    """As datasets' save_to_disk writes it."""
    directory.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(directory / "data-0.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": "data-0.arrow"}], "_fingerprint": fingerprint}
    (directory / "state.json").write_text(json.dumps(state))
    return directory


def _evaluator(model: Path, benchmark: Path, reward: dict[str, str] | None = None, **data: Any) -> Evaluator:
    config = Config.model_validate(
        {
            "model": {"hf_dir": model},
            "data": {"train_files": [benchmark], "apply_chat_template": True, **data},
            "evaluation": {"benchmarks": {"held": benchmark}, "samples_per_prompt": 1},
            "reward": {"verifier": "exact", **(reward or {})},
        }
    )
    return Evaluator(config, load_tokenizer(model))


def _store(evaluator: Evaluator, directory: Path) -> None:
    """The responses of a finished benchmark, with the settings of `evaluator`."""
    directory.mkdir(exist_ok=True)
    one = Generation(0, 0, "1+1", "2", "2", "2", 1.0, "ok", [1], -0.1, "stop")
    write_generations(generations_path(directory, "held"), [one], evaluator._settings("held", MODEL))


def test_each_thing_that_makes_a_prompt_is_named_when_it_changed(model: Path, tmp_path: Path) -> None:
    file, directory = _jsonl(tmp_path / "a.jsonl", ROWS), tmp_path / "evaluation"
    first = _evaluator(model, file)
    assert first.pending(directory, MODEL) == ["held"]
    _store(first, directory)
    assert _evaluator(model, file).pending(directory, MODEL) == []

    def refusal(evaluator: Evaluator, model_identity: dict[str, Any] = MODEL) -> str:
        with pytest.raises(UserError, match="made with other settings; choose another directory") as error:
            evaluator.pending(directory, model_identity)
        return str(error.value)

    assert "data.prompt_suffix (was '', is '?')" in refusal(_evaluator(model, file, prompt_suffix="?"))
    assert "data.system_prompt (was None, is 'add')" in refusal(_evaluator(model, file, system_prompt="add"))
    assert "the model's files" in refusal(first, {"files_sha256": "y"})
    assert "answer (was None, is 'first_line')" in refusal(_evaluator(model, file, {"answer": "first_line"}))
    template = model / "chat_template.jinja"
    template.write_text("{{ messages[0]['content'] }}{{ messages[0]['content'] }}")
    said = refusal(_evaluator(model, file))
    assert "the chat template" in said
    assert "the prompts, as the model reads them" in said
    template.write_text("{{ messages[0]['content'] }}")
    (model / "added_tokens.json").write_text("{}")
    assert "the tokenizer's files" in refusal(_evaluator(model, file))
    (model / "added_tokens.json").unlink()
    _jsonl(file, ROWS[:1])
    assert "the content of the benchmark" in refusal(_evaluator(model, file))


def test_a_date_in_the_template_is_part_of_the_identity(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d') }}{{ messages[0]['content'] }}")
    file, directory = _jsonl(tmp_path / "a.jsonl", ROWS), tmp_path / "evaluation"
    with pytest.raises(UserError, match="--template-date"):
        _evaluator(model, file)
    _store(_evaluator(model, file, template_date="2026-11-28"), directory)
    with pytest.raises(UserError, match=r"data\.template_date \(was '2026-11-28', is '2026-11-29'\)"):
        _evaluator(model, file, template_date="2026-11-29").pending(directory, MODEL)


def test_a_saved_dataset_is_a_benchmark_and_its_content_counts(model: Path, tmp_path: Path) -> None:
    saved, directory = _saved(tmp_path / "saved", ROWS), tmp_path / "evaluation"
    evaluator = _evaluator(model, saved)
    assert evaluator.problems["held"] == ["1+1", "1+2"]
    _store(evaluator, directory)
    # Saved again: only the fingerprint differs.
    _saved(saved, ROWS, fingerprint="b")
    assert _evaluator(model, saved).pending(directory, MODEL) == []
    _saved(saved, ROWS[:1])
    with pytest.raises(UserError, match="the content of the benchmark"):
        _evaluator(model, saved).pending(directory, MODEL)


def test_pass_rates_of_another_template_say_so(model: Path, tmp_path: Path) -> None:
    file, directory = _jsonl(tmp_path / "a.jsonl", ROWS), tmp_path / "evaluation"
    _store(_evaluator(model, file), directory)
    rates = directory / "held.parquet"
    config = DataConfig(train_files=[file], apply_chat_template=True, pass_rates=rates)
    report = TaskDataset(config, load_tokenizer(model), seed=1).report.lines()
    assert "recorded pass rates: 1 prompts, 0 of them outside the limits and left out" in report
    (model / "chat_template.jinja").write_text("a{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="recorded with other prompts, since the chat template changed"):
        TaskDataset(config, load_tokenizer(model), seed=1)
    suffix = config.model_copy(update={"prompt_suffix": "!"})
    with pytest.raises(UserError, match=r"data\.prompt_suffix \(was ''\)"):
        TaskDataset(suffix, load_tokenizer(model), seed=1)


def test_benchmark_paths_with_commas_and_equals_signs(tmp_path: Path) -> None:
    for folder in ("v1,final", "seed=3", "v1,seed=3"):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / folder / "h.parquet")
        assert _apart_at_commas(f"held={tmp_path}/{folder}/h.parquet") == [f"held={tmp_path}/{folder}/h.parquet"]
    two = [f"a={tmp_path}/v1,final/h.parquet", f"b={tmp_path}/seed=3/h.parquet"]
    assert _apart_at_commas(",".join(two)) == two
    assert _apart_at_commas("a=x.parquet,b=y.parquet") == ["a=x.parquet", "b=y.parquet"]
    assert _apart_at_commas("a=no,such/file.parquet") == ["a=no,such/file.parquet"]


def test_models_of_stored_evaluations_are_known_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"w" * 10)
    (tmp_path / "config.json").write_bytes(b"{}")
    # Names, sizes, then the first and the last MiB, which overlap in small files: as stored in directories that exist.
    stored = hashlib.sha256(b"config.json/2/{}{}" + b"model.safetensors/10/" + b"w" * 20).hexdigest()
    assert model_identity(tmp_path) == {"files_sha256": stored}
    (tmp_path / "model.safetensors").write_bytes(b"w" * 9 + b"v")
    assert model_identity(tmp_path) != {"files_sha256": stored}
