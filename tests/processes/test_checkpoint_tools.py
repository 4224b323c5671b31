"""The three command lines of tools/checkpoint_convert: options, output, exit statuses, and a kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from modules import load_module
from safetensors.torch import load_file, save_file

TOOLS = Path(__file__).resolve().parents[2] / "tools/checkpoint_convert"
GATE = "model.layers.1.mlp.gate_proj.weight"
Call = Callable[..., tuple[int, str, str]]


def write_model(directory: Path, **sizes: int) -> Path:
    """A random Qwen3 directory with something in place of a tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(5)
    shape = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(**(shape | sizes), num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tools") / "hf")


@pytest.fixture(scope="module")
def converted(hf_dir: Path) -> Path:
    directory = hf_dir.with_name("converted")
    assert tool("hf_to_megatron").main(["--hf-dir", str(hf_dir), "--output-dir", str(directory)]) == 0
    return directory


def tool(name: str) -> ModuleType:
    """One of the scripts as a module."""
    return load_module(TOOLS / f"{name}.py", name)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """`call(tool, *arguments)` -> exit status, stdout, stderr."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        status = tool(name).main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def test_there_and_back_with_progress_in_bytes_and_rates(call: Call, hf_dir: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    status, output, errors = call("hf_to_megatron", "--hf-dir", hf_dir, "--output-dir", there, "--workers", 1)
    assert (status, errors) == (0, "")
    assert "converting to torch_dist: 0.00 GB\n" in output
    assert " of 0.00 GB, " in output
    assert " MB/s, " in output
    assert f" left\nwrote {there}\n" in output
    status, output, errors = call(
        "megatron_to_hf", "--megatron-dir", there, "--output-dir", back, "--max-shard-gb", 0.00002
    )
    assert (status, errors) == (0, "")
    assert output.endswith(f"wrote {back}\n")
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    found = {name: value for path in back.glob("*.safetensors") for name, value in load_file(path).items()}
    assert all(torch.equal(value, found[name]) for name, value in load_file(hf_dir / "model.safetensors").items())
    assert (back / "tokenizer.json").is_file()


def test_another_dtype_and_a_template(call: Call, hf_dir: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert call("hf_to_megatron", "--hf-dir", hf_dir, "--output-dir", there, "--dtype", "bfloat16")[0] == 0
    (there / "config.json").unlink()
    status, _, errors = call("megatron_to_hf", "--megatron-dir", there, "--output-dir", back)
    assert status == 2
    assert errors.startswith("error: ")
    assert "name a Hugging Face directory of the same model" in errors
    options = ("--megatron-dir", there, "--output-dir", back, "--hf-template", hf_dir)
    assert call("megatron_to_hf", *options)[0] == 0
    assert load_file(back / "model.safetensors")[GATE].dtype == torch.bfloat16


def test_a_refusal_lists_everything_and_writes_nothing(call: Call, hf_dir: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((hf_dir / "config.json").read_text())
    tensors = load_file(hf_dir / "model.safetensors")
    tensors["extra"] = tensors.pop(GATE)
    save_file(tensors, damaged / "model.safetensors")
    status, output, errors = call("hf_to_megatron", "--hf-dir", damaged, "--output-dir", tmp_path / "out")
    assert (status, output) == (2, "")
    assert f"missing tensors (1):\n    - {GATE}" in errors
    assert "unexpected tensors (1):\n    - extra" in errors
    status, _, errors = call("hf_to_megatron", "--hf-dir", hf_dir, "--output-dir", damaged)
    assert status == 2
    assert "exists and is not empty" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


@pytest.mark.parametrize("name", ["hf_to_megatron", "megatron_to_hf", "verify"])
def test_what_is_required_is_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool(name).main([])
    assert ended.value.code == 2
    assert "the following arguments are required: --" in capsys.readouterr().err


def test_verify_tells_equal_different_and_not_comparable_apart(
    call: Call, hf_dir: Path, converted: Path, tmp_path: Path
) -> None:
    status, output, _ = call("verify", "--hf-dir", hf_dir, "--megatron-dir", converted)
    assert status == 0
    assert output.endswith("tensors compared, 0 differ\n")
    other = write_model(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors[GATE][2, 1] += 0.25
    save_file(tensors, other / "model.safetensors")
    status, output, _ = call("verify", "--hf-dir", other, "--megatron-dir", converted)
    assert status == 1
    assert "tensors compared, 1 differ" in output
    assert "0.25" in output
    rounded = tmp_path / "rounded"
    assert call("hf_to_megatron", "--hf-dir", hf_dir, "--output-dir", rounded, "--dtype", "bfloat16")[0] == 0
    status, output, _ = call("verify", "--hf-dir", hf_dir, "--megatron-dir", rounded)
    assert status == 0
    assert "0 differ" in output
    assert "of them are float32 and bfloat16: compared as bfloat16" in output
    status, output, _ = call("verify", "--hf-dir", other, "--megatron-dir", rounded)
    assert status == 1
    assert "tensors compared, 1 differ" in output
    status, _, errors = call("verify", "--hf-dir", hf_dir, "--megatron-dir", tmp_path)
    assert status == 2
    assert "error: " in errors
    assert "not a distributed checkpoint" in errors


def test_verify_compares_logits_through_both_models(call: Call, tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    hf_dir, converted = tmp_path / "hf", tmp_path / "converted"
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 50}
    experts = {"moe_intermediate_size": 26, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    config = Qwen3MoeConfig(vocab_size=53, hidden_size=30, num_hidden_layers=2, **attention, **experts)
    Qwen3MoeForCausalLM(config).save_pretrained(hf_dir)
    assert call("hf_to_megatron", "--hf-dir", hf_dir, "--output-dir", converted)[0] == 0
    command = [sys.executable, str(TOOLS / "verify.py"), "--hf-dir", str(hf_dir), "--megatron-dir", str(converted)]
    done = subprocess.run(
        [*command, "--logits"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "through the models, float32: log-probs within" in done.stdout


@pytest.mark.parametrize("name", ["hf_to_megatron", "megatron_to_hf"])
def test_killed_in_the_middle_and_run_again(name: str, call: Call, tmp_path: Path) -> None:
    source, output = write_model(tmp_path / "hf", vocab_size=150_000, hidden_size=128), tmp_path / "out"
    option = "--hf-dir"
    if name == "megatron_to_hf":
        assert call("hf_to_megatron", "--hf-dir", source, "--output-dir", tmp_path / "there")[0] == 0
        source, option = tmp_path / "there", "--megatron-dir"
    arguments = [option, str(source), "--output-dir", str(output)]
    partial = tmp_path / ".out.partial"
    with subprocess.Popen(
        [sys.executable, str(TOOLS / f"{name}.py"), *arguments], stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not partial.is_dir() and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert partial.is_dir()
    assert not output.exists()
    assert call(name, *arguments)[0] == 0
    assert not partial.exists()
    compared = (tmp_path / "hf", output) if name == "hf_to_megatron" else (output, source)
    assert call("verify", "--hf-dir", compared[0], "--megatron-dir", compared[1])[0] == 0
