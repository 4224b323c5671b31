"""The command line itself: what holds for every command."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_entropic import __version__
from megatron_entropic.algorithms import find_policy_loss
from megatron_entropic.cli import _parser, main
from megatron_entropic.commands import evaluate as evaluate_command
from megatron_entropic.errors import UserError, missing_model


def test_the_package_runs_without_its_command_and_says_its_version() -> None:
    command = [sys.executable, "-m", "megatron_entropic", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert shown == f"megatron-entropic {__version__}\n"


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "a/model.v1"])
def test_a_name_of_the_hub_gets_the_command_that_fetches_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hint = f"hf download {name} --local-dir {name}"
    (tmp_path / "run.yaml").write_text(f"model: {{hf_dir: {name}}}\ndata: {{train_files: [x.parquet]}}\n")
    for command in (
        ["train", "run.yaml"],
        ["score", "--hf-dir", name, "--tokens", "in.jsonl", "--output", "out.jsonl"],
        ["evaluate", "--model", name, "--benchmarks", "a=run.yaml", "--output-dir", "out"],
        ["export", name, "--quantize", "fp8", "--calibration", "x.parquet", "--output-dir", "out"],
        ["convert", "hf-to-megatron", "--hf-dir", name, "--output-dir", "out"],
        ["verify", "--hf-dir", name, "--megatron-dir", "out"],
    ):
        assert main(command) == 2
        assert hint in capsys.readouterr().err


@pytest.mark.parametrize("path", ["model", "./a/b/c", "/models/Qwen3-8B", "a/b c", "-a/b"])
def test_what_cannot_be_a_name_of_the_hub_gets_no_hint(path: str) -> None:
    assert missing_model(Path(path)).endswith("no such model directory")


def test_every_command_finds_modules_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`replay`, as an installed command, did not find the loss that `train` had found."""
    (tmp_path / "loss_of_mine.py").write_text("def loss(inputs, settings):\n    return inputs\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    with pytest.raises(UserError, match="No module named 'loss_of_mine'"):
        find_policy_loss("loss_of_mine:loss")
    monkeypatch.chdir(tmp_path)
    assert find_policy_loss("loss_of_mine:loss").whole_sequences


NUMBERS = {
    "plan run.yaml": ["--gpus 0", "--gpus -4", "--gpus 1.5", "--gpu-memory-gb nan", "--gpu-memory-gb inf"],
    "score --hf-dir m --tokens t --output o": ["--temperature 0", "--temperature nan", "--tensor-parallel 0"],
    "evaluate --model m --benchmarks a=b --output-dir o": [
        "--top-p 1.5",
        "--top-p nan",
        "--engines 0",
    ],
    "export m --quantize int8 --output-dir o --calibration c": ["--max-prompts 0", "--max-kl nan", "--max-kl -1"],
    "replay run": ["--step 0", "--step x"],
    "rollouts run": ["--prompts 0", "--max-tokens -1", "--step -1"],
    "tune run": ["--settling-steps nan", "--settling-steps 0", "--target inf", "--last 0"],
    "convert hf-to-megatron --hf-dir m --output-dir o": ["--workers 0"],
    "convert megatron-to-hf --megatron-dir m --output-dir o": ["--max-shard-gb nan", "--max-shard-gb 1e400"],
}


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command in NUMBERS for option in NUMBERS[command]]
)
def test_a_number_that_nothing_can_be_done_with_is_the_option_s_error(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`plan --gpu-memory-gb nan` was a traceback, and `evaluate --samples 0` pydantic's own words."""
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), *option.split()])
    assert ended.value.code == 2
    name, value = option.split()
    assert f"argument {name}: expected a" in (said := capsys.readouterr().err)
    assert f"found '{value}'" in said


@pytest.mark.parametrize("option", ["--samples", "--max-tokens"])
@pytest.mark.parametrize("number", ["0", "-3", "nan", "a=0", "\u0663"])
def test_numbers_of_an_evaluation_are_counted(option: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--model", "m", "--benchmarks", "a=b", "--output-dir", "o", f"{option}={number}"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{option} {number.removeprefix('a=')!r}: expected an integer of at least 1" in said
    assert "pydantic" not in said


def test_benchmarks_have_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_command, "evaluation_violations", lambda config: [])
    command = "evaluate --model m --benchmarks a=x b=y --output-dir o --max-prompt-tokens 5"
    words = [*command.split(), "--samples", "4", "a=2", "--max-tokens", "30", "b=50"]
    config = evaluate_command.evaluation_config(_parser().parse_args(words))
    assert [config.evaluation.samples(name) for name in "ab"] == [2, 4]
    assert [config.evaluation_sampling(name).max_response_tokens for name in "ab"] == [30, 50]
    assert config.max_engine_tokens == 55


@pytest.mark.parametrize(("positions", "lengths"), [(None, (1024, 8192)), (32768, (1024, 8192)), (64, (32, 32))])
def test_lengths_of_an_evaluation_fit_the_model(
    positions: int | None, lengths: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SimpleNamespace(model=tmp_path, max_prompt_tokens=None)

    def dimensions(_hf_dir: Path) -> Any:
        if positions is None:
            raise UserError("no such model")
        return SimpleNamespace(max_position_embeddings=positions)

    monkeypatch.setattr(evaluate_command, "read_dimensions", dimensions)
    assert evaluate_command._lengths(options, None) == lengths
    options.max_prompt_tokens = 7
    assert evaluate_command._lengths(options, 9) == (7, 9)


def test_an_evaluation_holds_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_command, "evaluation_violations", lambda config: [])
    command = ["evaluate", "--model", "m", "--benchmarks", "a=b", "--output-dir", "o", "--max-tokens", "40"]
    options = ["--environment", "guess", "--environment-settings", '{"cost": 0.2}', "--max-turns", "3", "--stop", r"\n"]
    config = evaluate_command.evaluation_config(_parser().parse_args([*command, *options]))
    assert (config.environment.name, config.environment.settings, config.environment.max_turns) == (
        "guess",
        {"cost": 0.2},
        3,
    )
    assert config.rollout.stop == ["\n"]
    plain = evaluate_command.evaluation_config(_parser().parse_args(command))
    assert plain.environment.section is None
    for wrong in ("[1]", "{", "1e"):
        with pytest.raises(SystemExit):
            _parser().parse_args([*command, "--environment-settings", wrong])


def test_every_command_that_takes_minutes_says_what_it_is_doing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`score`, `export` and `replay` loaded a model without a word, as `evaluate` did."""
    score = ["score", "--hf-dir", str(tmp_path), "--tokens", "t", "--output", "o", "--backend", "transformers"]
    export = ["export", str(tmp_path), "--quantize", "int8", "--output-dir", str(tmp_path / "o"), "--calibration", "c"]
    for command, phase in (
        (score, "0 s  scoring with transformers"),
        (export, "0 s  reading prompts and the headers of the weights"),
        (["replay", str(tmp_path), "--step", "1"], "0 s  reading the recorded step"),
    ):
        assert main(command) == 2
        said = capsys.readouterr()
        assert phase in said.err
        assert "error:" in said.err
        assert not said.out


def test_a_page_where_no_directory_can_be_made_is_the_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`report --output /proc/x` was a traceback."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 1.0}\n')
    (tmp_path / "file").touch()
    assert main(["report", str(tmp_path / "file")]) == 2
    assert "file: is a file, not a directory" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "file")]) == 2
    assert "file: is there already and is no directory" in capsys.readouterr().err

    def refuse(*_: Any, **__: Any) -> None:  # as below /proc, to root
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["report", str(tmp_path), "--output", "/proc/x"]) == 2
    assert "/proc/x: no directory can be made there" in capsys.readouterr().err
