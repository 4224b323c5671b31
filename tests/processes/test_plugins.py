"""Plug-ins inside the trainers they are for: the tests in tests/plugins, each file in a process of its own.

Those trainers lie in `.venv/hosts`, in the versions of requirements/plugins.txt. Another version is one red test here,
and what would run inside it is skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTS = Path(sys.prefix) / "hosts"


def other_versions() -> list[str]:
    """What is installed in another version than the lock says, or not at all."""
    locked = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements/plugins.txt").read_text(), re.MULTILINE)
    installed = {
        found.metadata["Name"].lower().replace("_", "-"): found.version
        for found in metadata.distributions(path=[str(HOSTS)])
    }
    return [
        f"{name} {installed.get(name, 'is missing')}, locked is {version}"
        for name, version in locked
        if installed.get(name) != version
    ]


def test_hosts_of_the_plugins_are_in_their_locked_versions() -> None:
    assert other_versions() == [], "tools/environment.sh installs them, tools/lock_requirements.sh plugins locks others"


@pytest.mark.parametrize("host", ["trl", "verl", "slime"])
def test_plugin_works_inside(host: str) -> None:
    if other_versions():
        pytest.skip("another version than the locked one, see the test above")
    if host == "slime" and not os.environ.get("SLIME_CHECKOUT"):
        pytest.skip("SLIME_CHECKOUT names no checkout of slime, which no index has")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOSTS), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/plugins/test_{host}.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
