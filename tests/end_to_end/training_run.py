"""A training run through the real command line: Ray, megatron-core ranks, vLLM engines, each in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VARYING = ("time/", "throughput/", "memory/", "cluster/")
"""Metrics that no two runs share."""


def countdown_settings(directory: Path, assets: Path) -> list[str]:
    """Arguments of a small run of examples/countdown_cpu.yaml: 12 supervised steps, 6 rollouts of 64 responses."""
    settings = {
        "run.output_dir": directory,
        "model.hf_dir": assets / "model",
        "data.train_files": assets / "train.parquet",
        "warm_start.file": assets / "warm_start.parquet",
        "warm_start.steps": 12,
        "warm_start.warmup_steps": 3,
        "reward.verifier": "tests.end_to_end.string_rewards:digit_share",
        "reward.workers": 1,
        "rollout.prompts_per_step": 8,
        "train.steps": 6,
        "checkpoint.every_steps": 2,
        "logging.wandb": "off",
    }
    return [str(ROOT / "examples/countdown_cpu.yaml"), *(f"{key}={value}" for key, value in settings.items())]


def run_script(script: Path, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, one thread each, to its end; what it printed and its status."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
        timeout=560,
    )


@dataclass
class Run:
    """A training run in a process group of its own."""

    directory: Path
    arguments: list[str]
    inside: tuple[str, ...] = ()
    """What the command runs in: a program that executes its arguments."""

    def start(self) -> subprocess.Popen[str]:
        """Start `megatron-entropic train`; output goes to train.log beside the run directory."""
        with self.log.open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [*self.inside, sys.executable, "-m", "megatron_entropic.cli", "train", *self.arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def finish(self) -> None:
        """Run to the end; the test fails with the log if the run does."""
        process = self.start()
        try:
            status = process.wait(timeout=500)
        finally:
            process.kill()
        assert status == 0, self.log.read_text(encoding="utf-8")

    @property
    def log(self) -> Path:
        """Everything the run's attempts printed."""
        return self.directory.with_suffix(".log")

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl; a line that is being written is left out."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def reproducible_metrics(self) -> list[dict[str, Any]]:
        """The rows without what depends on the clock."""
        return [{k: v for k, v in row.items() if not k.startswith(VARYING)} for row in self.metrics()]
