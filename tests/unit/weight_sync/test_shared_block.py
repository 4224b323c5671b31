"""Blocks that two processes share, and those that are not to be had."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

from megatron_entropic.weight_sync.shared_memory import SharedBlock

WRITE = """
import sys
from megatron_entropic.weight_sync.shared_memory import SharedBlock
SharedBlock.open(sys.argv[1], sys.argv[2]).bytes[5:8] = 7
"""


def test_another_process_writes_what_is_read_here():
    block = SharedBlock.create(100)
    subprocess.run([sys.executable, "-c", WRITE, block.path, block.token], check=True)
    assert block.bytes.numel() == 100
    assert block.bytes.nonzero().flatten().tolist() == [5, 6, 7]
    path = block.path
    block.admit_nobody_else()
    assert SharedBlock.open(path, block.token) is None
    assert int(block.bytes[5]) == 7


def test_a_file_at_the_same_path_of_another_machine_is_not_the_block(tmp_path: Path):
    block = SharedBlock.create(100)
    other = tmp_path / "other"
    other.write_bytes(bytes(200))
    assert SharedBlock.open(str(other), block.token) is None
    assert SharedBlock.open(block.path, "0" * 32) is None


def test_without_room_there_is_no_block_and_no_open_file(monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    assert SharedBlock.create(100) is None
    assert len(os.listdir("/proc/self/fd")) == before
