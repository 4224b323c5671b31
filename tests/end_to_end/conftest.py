"""Small runs of the Countdown example."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training_run import ROOT, Run


@pytest.fixture(scope="session")
def countdown_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, tokenizer and data of the Countdown example."""
    folder = tmp_path_factory.mktemp("countdown") / "assets"
    subprocess.run(
        [sys.executable, str(ROOT / "examples/countdown/prepare.py"), "--output", str(folder)], check=True, timeout=120
    )
    return folder


@pytest.fixture(scope="session")
def countdown_run(countdown_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Builds a small run of examples/countdown_cpu.yaml: 4 supervised steps, 6 rollouts of 64 responses."""

    def build(name: str, *overrides: str) -> Run:
        directory = tmp_path_factory.mktemp(name) / "run"
        settings = {
            "run.output_dir": directory,
            "model.hf_dir": countdown_dir / "model",
            "data.train_files": countdown_dir / "train.parquet",
            "warm_start.file": countdown_dir / "warm_start.parquet",
            "warm_start.steps": 12,
            "warm_start.warmup_steps": 3,
            "reward.verifier": "tests.end_to_end.string_rewards:digit_share",
            "reward.workers": 1,
            "rollout.prompts_per_step": 8,
            "train.steps": 6,
            "checkpoint.every_steps": 2,
            "logging.wandb": "off",
        }
        arguments = [f"{key}={value}" for key, value in settings.items()]
        return Run(directory, [str(ROOT / "examples/countdown_cpu.yaml"), *arguments, *overrides])

    return build
