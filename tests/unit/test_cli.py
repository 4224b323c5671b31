"""The command line itself: what holds for every command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_entropic.algorithms import find_policy_loss
from megatron_entropic.cli import main


def test_every_command_finds_modules_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`replay`, as an installed command, did not find the loss that `train` had found."""
    (tmp_path / "loss_of_mine.py").write_text("def loss(inputs):\n    return inputs\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    with pytest.raises(ValueError, match="No module named 'loss_of_mine'"):
        find_policy_loss("loss_of_mine:loss")
    assert main(["replay", str(tmp_path), "--step", "1"]) == 2
    assert find_policy_loss("loss_of_mine:loss").whole_sequences
