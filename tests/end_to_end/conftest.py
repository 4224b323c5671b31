"""Small runs of the Countdown example."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training_run import ROOT, Run, countdown_settings


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
        return Run(directory, [*countdown_settings(directory, countdown_dir), *overrides])

    return build
