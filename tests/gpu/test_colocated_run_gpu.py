"""Whole training runs on one GPU: the policy and the engine take turns, and weights pass from one to the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.policies import random_weights

ROOT = Path(__file__).resolve().parents[2]
LARGE = ROOT / "megatron_entropic/planning/model_configs/OpenReasoning-Nemotron-1.5B.json"
COLOCATED = {
    "rollout.gpu_memory_fraction": 0.3,
    "rollout.enforce_eager": "true",  # compiling and capturing takes a minute of a machine that may be lent for minutes
    "policy.tensor_parallel": 1,
    "policy.offload": "all",
    "logging.wandb": "off",
    "cluster.device": "cuda",
    "cluster.colocate": "true",
    "cluster.check_weights": "true",  # every tensor, after every publication; a difference ends the run
    "cluster.startup_timeout_s": 400,
}


def train(run_dir: Path, model_dir: Path, countdown_dir: Path, settings: dict[str, Any]) -> list[dict[str, float]]:
    """Metrics of a run of the Countdown example with these settings; they are kept where first_light.sh looks."""
    settings = COLOCATED | {
        "run.output_dir": run_dir,
        "model.hf_dir": model_dir,
        "data.train_files": countdown_dir / "train.parquet",
        "warm_start.file": countdown_dir / "warm_start.parquet",
        **settings,
    }
    arguments = [str(ROOT / "examples/countdown_cpu.yaml"), *(f"{key}={value}" for key, value in settings.items())]
    command = [sys.executable, "-m", "megatron_entropic.cli", "train", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-9000:]
    metrics = run_dir / "metrics.jsonl"
    if folder := os.environ.get("FIRST_LIGHT_OUTPUT"):
        shutil.copy(metrics, Path(folder) / f"{run_dir.name}.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


@pytest.mark.parametrize("transport", ["ipc", "gloo"])
def test_every_weight_arrives_in_the_engine_that_shares_the_gpu(
    countdown_dir: Path, tmp_path: Path, transport: str
) -> None:
    settings = {
        "warm_start.steps": 12,
        "warm_start.warmup_steps": 3,
        "rollout.prompts_per_step": 8,
        "train.steps": 6,
        "cluster.transport": transport,
    }
    rows = train(tmp_path / f"countdown_{transport}", countdown_dir / "model", countdown_dir, settings)
    assert len(rows) == 6
    assert all(row["mismatch/logprob_abs_mean"] < 1e-3 for row in rows), "weights of another step would be far off"
    assert all(row["memory/offloaded_mb"] > 1 for row in rows)


def test_a_large_model_in_bfloat16_is_published_and_agrees(
    gpu: torch.device, countdown_dir: Path, tmp_path: Path
) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(countdown_dir / "model", model_dir)
    # Of the example only the tokenizer stays: it knows the first few dozen ids, and random weights sample all.
    (model_dir / "config.json").write_text(LARGE.read_text())
    random_weights(model_dir, torch.bfloat16, gpu)
    torch.cuda.empty_cache()
    settings = {
        "model.dtype": "bfloat16",
        "warm_start.steps": 0,
        "rollout.prompts_per_step": 16,
        "rollout.max_response_tokens": 256,
        "policy.tokens_per_microbatch": 8192,
        "train.steps": 3,
        "cluster.transport": "ipc",
    }
    rows = train(tmp_path / "large", model_dir, countdown_dir, settings)
    assert len(rows) == 3
    # Two implementations round to bfloat16 at different places; other weights would be off by tenths.
    assert all(row["mismatch/logprob_abs_mean"] < 3e-2 for row in rows)
