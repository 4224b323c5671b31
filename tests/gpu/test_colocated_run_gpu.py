"""A whole training run on one GPU: the policy and the engine take turns, and weights pass from one to the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("transport", ["ipc", "gloo"])
def test_every_weight_arrives_in_the_engine_that_shares_the_gpu(
    countdown_dir: Path, tmp_path: Path, transport: str
) -> None:
    settings = {
        "run.output_dir": tmp_path / "run",
        "model.hf_dir": countdown_dir / "model",
        "data.train_files": countdown_dir / "train.parquet",
        "warm_start.file": countdown_dir / "warm_start.parquet",
        "warm_start.steps": 12,
        "warm_start.warmup_steps": 3,
        "rollout.prompts_per_step": 8,
        "rollout.gpu_memory_fraction": 0.3,
        "policy.tensor_parallel": 1,
        "policy.offload": "all",
        "train.steps": 6,
        "logging.wandb": "off",
        "cluster.device": "cuda",
        "cluster.colocate": "true",
        "cluster.transport": transport,
        "cluster.check_weights": "true",  # every tensor, after every publication; a difference ends the run
        "cluster.startup_timeout_s": 400,
    }
    arguments = [str(ROOT / "examples/countdown_cpu.yaml"), *(f"{key}={value}" for key, value in settings.items())]
    run = subprocess.run(
        [sys.executable, "-m", "megatron_entropic.cli", "train", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["mismatch/logprob_abs_mean"] < 1e-3 for row in rows), "weights of another step would be far off"
    assert all(row["memory/offloaded_mb"] > 1 for row in rows)
