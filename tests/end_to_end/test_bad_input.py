"""What a user gets wrong: one clear error each, before anything is started, and a status that scripts can read."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training_run import Run

from megatron_entropic.cli import main
from megatron_entropic.training.run_directory import RunDirectory


@pytest.fixture
def train(countdown_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `train` in this process; returns its status and what it printed on standard error."""

    def run(*overrides: str) -> tuple[int, str]:
        status = main(["train", *countdown_run("bad").arguments, *overrides])
        return status, capsys.readouterr().err

    return run


def test_all_violations_come_at_once(train: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    status, message = train(
        f"model.hf_dir={tmp_path / 'nowhere'}",
        f"data.train_files={tmp_path / 'nothing.parquet'}",
        "rollout.temprature=1",
        "rollout.prompts_per_step=0",
        "algorithm.optimizer_steps_per_rollout=3",
    )
    assert status == 2
    for part in (
        "nowhere",
        "nothing.parquet",
        "did you mean rollout.temperature",
        "rollout.prompts_per_step",
    ):
        assert part in message


def test_an_unsupported_architecture_names_the_supported_ones(
    train: Callable[..., tuple[int, str]], countdown_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(countdown_dir / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (model / "config.json").write_text(json.dumps(config))
    status, message = train(f"model.hf_dir={model}")
    assert status == 2
    assert "GPT2LMHeadModel" in message
    assert "Qwen3ForCausalLM" in message


def test_tensor_parallel_that_does_not_divide_the_heads(train: Callable[..., tuple[int, str]]) -> None:
    status, message = train("policy.tensor_parallel=3")
    assert status == 2
    assert "heads" in message


def _fails(run: Run) -> tuple[int, str]:
    """Status and output of a run in a process of its own, which must end by itself."""
    process = run.start()
    try:
        return process.wait(timeout=300), run.log.read_text(encoding="utf-8")
    finally:
        process.kill()


def test_a_prompt_longer_than_the_budget(train: Callable[..., tuple[int, str]]) -> None:
    status, message = train("data.max_prompt_tokens=8")
    assert status == 2
    assert "data.max_prompt_tokens=8" in message
    assert "Traceback" not in message


def test_an_empty_data_file(train: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    status, message = train(f"data.train_files={tmp_path / 'empty.jsonl'}")
    assert status == 2
    assert "empty.jsonl" in message
    assert "Traceback" not in message


def test_a_truncated_weight_file(train: Callable[..., tuple[int, str]], countdown_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(countdown_dir / "model", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    status, message = train(f"model.hf_dir={model}")
    assert status == 2
    assert "model.safetensors" in message
    assert "Traceback" not in message


def test_a_missing_ray_cluster(train: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray looks for its servers among all processes of the machine, where a neighbour's may be.
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(set))
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: None)
    status, message = train("cluster.address=auto")
    assert status == 1
    assert "no Ray cluster at cluster.address=auto" in message


def test_a_run_directory_in_use(countdown_run: Callable[..., Run]) -> None:
    from megatron_entropic.training.machine import load_checked_config

    run = countdown_run("locked")
    config = load_checked_config(run.arguments[0], run.arguments[1:])
    with RunDirectory(config):
        status, message = _fails(run)
    assert status == 1
    assert "another process is running in" in message


def test_check_validates_and_starts_nothing(
    countdown_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = countdown_run("check")
    assert main(["train", run.arguments[0], "--check", *run.arguments[1:]]) == 0
    assert "8 prompts x 8 = 64" in capsys.readouterr().out
    assert not run.directory.exists()


def test_score_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str], countdown_dir: Path) -> None:
    common = ["score", "--hf-dir", str(countdown_dir / "model"), "--tokens", "in.jsonl", "--output", "out.jsonl"]
    for extra, part in (
        (["--backend", "transformers", "--expert-parallel", "2"], "--backend transformers"),
        (["--backend", "vllm", "--tensor-parallel", "2"], "--backend vllm"),
        ([], "in.jsonl"),
    ):
        assert main([*common, *extra]) == 2
        assert part in capsys.readouterr().err
