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
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
HOSTS = Path(sys.prefix) / "hosts"


def locked_versions() -> dict[str, str]:
    """Version of each package that the lock names."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements/plugins.txt").read_text(), re.MULTILINE))


def other_versions() -> list[str]:
    """What is installed in another version than the lock says, or not at all."""
    installed = {
        found.metadata["Name"].lower().replace("_", "-"): found.version
        for found in metadata.distributions(path=[str(HOSTS)])
    }
    return [
        f"{name} {installed.get(name, 'is missing')}, locked is {version}"
        for name, version in locked_versions().items()
        if installed.get(name) != version
    ]


def test_hosts_of_the_plugins_are_in_their_locked_versions() -> None:
    assert other_versions() == [], "tools/environment.sh installs them, tools/lock_requirements.sh plugins locks others"


def test_a_new_release_of_a_host_is_one_that_our_extras_admit() -> None:
    """`pip install megatron_entropic[trl]` brings what the tests below ran in."""
    extras = [Requirement(line) for line in metadata.requires("megatron_entropic") or [] if "extra ==" in line]
    hosts = {one.name: one.specifier for one in extras if one.name in ("trl", "verl", "transferqueue")}
    locked = locked_versions()
    refused = [
        f"{name} {locked[name]}, setup.py: {found}" for name, found in hosts.items() if locked[name] not in found
    ]
    assert len(hosts) == 3
    assert refused == [], "read what the host changed, then move the bounds in setup.py and the pages in docs/plugins"


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
