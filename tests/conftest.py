"""Settings of all tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from megatron_entropic.cluster.environment import prepare_ray_environment
from megatron_entropic.config.run import ClusterConfig

# Before any test imports Ray: the sessions of this process are private ones.
prepare_ray_environment(ClusterConfig())

# The same examples every time, and no time limit for one: the machine may be busy with another test's processes.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def countdown_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, tokenizer and data of the Countdown example."""
    folder = tmp_path_factory.mktemp("countdown") / "assets"
    script = Path(__file__).resolve().parents[1] / "examples/countdown/prepare.py"
    subprocess.run([sys.executable, str(script), "--output", str(folder)], check=True, timeout=300)
    return folder
