"""What is said when something does not answer in time."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from megatron_entropic.cluster.processes import full_shared_memory


def test_a_wait_in_vain_says_when_dev_shm_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /dev/shm ended a run with `waited 108 s for the engine workers` and nothing else."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=400 << 20, free=4096))
    assert "/dev/shm of this machine is full (400 MiB)" in full_shared_memory()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=400 << 20, free=2 << 20))
    assert full_shared_memory() == ""

    def missing(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(shutil, "disk_usage", missing)
    assert full_shared_memory() == ""
