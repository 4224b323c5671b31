"""The command line itself: what holds for every command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_entropic import __version__
from megatron_entropic.algorithms import find_policy_loss
from megatron_entropic.cli import main
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
