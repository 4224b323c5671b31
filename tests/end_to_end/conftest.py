"""Small runs of the Countdown example."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_run import Run, countdown_settings


@pytest.fixture(scope="session")
def countdown_run(countdown_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Builds a small run of examples/countdown_cpu.yaml: 12 supervised steps, 6 rollouts of 64 responses."""

    def build(name: str, *overrides: str) -> Run:
        directory = tmp_path_factory.mktemp(name) / "run"
        return Run(directory, [*countdown_settings(directory, countdown_dir), *overrides])

    return build
