"""A run goes on with the adapters it was saved with, and with no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_entropic.checkpoints.run_checkpoints import begin_checkpoint, checkpoint_path, finish_checkpoint
from megatron_entropic.config.policy import LoraConfig
from megatron_entropic.config.run import RunConfig
from megatron_entropic.errors import UserError
from megatron_entropic.training.preconditions import check_resumable


def saved(folder: Path, lora: LoraConfig) -> RunConfig:
    directory = checkpoint_path(folder / "checkpoints", 2)
    begin_checkpoint(directory)
    finish_checkpoint(directory, {"state": {"lora": lora.shape, "driver": {"step": 2}}})
    return RunConfig(output_dir=folder)


def test_the_same_adapters_go_on_wherever_they_began(tmp_path: Path) -> None:
    run = saved(tmp_path, LoraConfig(rank=4))
    check_resumable(run, 9, LoraConfig(rank=4, adapter_dir=Path("elsewhere")))


def test_other_adapters_are_refused_before_anything_starts(tmp_path: Path) -> None:
    run = saved(tmp_path, LoraConfig(rank=4, target_modules=["q_proj"]))
    with pytest.raises(UserError) as refused:
        check_resumable(run, 9, LoraConfig(rank=8, target_modules=["q_proj"]))
    assert "written with policy.lora.rank=4, policy.lora.alpha=32, policy.lora.target_modules=[q_proj]" in str(
        refused.value
    )
    with pytest.raises(UserError, match=r"asks for policy\.lora\.rank=0"):
        check_resumable(run, 9, LoraConfig())


def test_weights_do_not_become_adapters(tmp_path: Path) -> None:
    run = saved(tmp_path, LoraConfig())
    check_resumable(run, 9, LoraConfig())
    with pytest.raises(UserError, match=r"written with policy\.lora\.rank=0"):
        check_resumable(run, 9, LoraConfig(rank=8))
