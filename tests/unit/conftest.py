"""Directories of tiny models, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_families import FAMILIES, build_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture(scope="session", params=[(f, t) for f in FAMILIES for t in (False, True)], ids=str)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """(model, directory) of every family, tied and untied. Read only: the directory is shared."""
    family, tied = request.param
    directory = tmp_path_factory.mktemp(f"{family}_{tied}")
    model = build_tiny(family, tied)
    model.save_pretrained(directory)
    return model, directory


@pytest.fixture
def qwen3_dir(tmp_path: Path) -> Path:
    """An untied Qwen3 directory that a test may damage."""
    directory = tmp_path / "model"
    build_tiny("qwen3", False).save_pretrained(directory)
    return directory


@pytest.fixture
def deepseek_v3_dir(tmp_path: Path) -> Path:
    """An untied DeepSeek-V3 directory that a test may change."""
    directory = tmp_path / "model"
    build_tiny("deepseek_v3", False).save_pretrained(directory)
    return directory


@pytest.fixture
def qwen3_sharded_dir(tmp_path: Path) -> Path:
    """The same in several files with an index."""
    directory = tmp_path / "sharded"
    build_tiny("qwen3", False).save_pretrained(directory, max_shard_size="10KB")
    return directory
