"""Tests that need a GPU: `pytest tests/gpu` runs them all, and where there is none skips them and says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The first GPU."""
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU: torch {torch.__version__} sees none (torch.cuda.is_available() is False)")
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """Tests here are large; what one leaves in PyTorch's cache is not available to the next at its full size."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def nccl(gpu: torch.device, tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of this process only."""
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1, device_id=gpu
    )
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()
