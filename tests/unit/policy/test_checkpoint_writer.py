"""The thread that writes checkpoints in the background."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_entropic.policy.state import checkpoint_writer


@pytest.mark.parametrize("niceness", [0, 10, 19])
def test_a_run_of_somebody_without_privileges_under_nice_writes_checkpoints(
    monkeypatch: pytest.MonkeyPatch, niceness: int
) -> None:
    """`nice -n 15` for everybody but root, and containers that forbid it: "A thread initializer failed"."""
    asked = []

    def refuse(_which: int, _thread: int, priority: int) -> None:
        asked.append(priority)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "getpriority", lambda _which, _thread: niceness)
    monkeypatch.setattr(os, "setpriority", refuse)
    checkpoint_writer._prepare_thread(torch.device("cpu"))
    assert asked == ([10] if niceness < 10 else [])
