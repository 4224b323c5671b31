"""The section policy.lora: what has no use, what does not go together, and models that get no adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from small_qwen3 import QWEN3
from test_config import machine, problems_of, write

from megatron_entropic.config.algorithm import AlgorithmConfig
from megatron_entropic.config.load import load_config
from megatron_entropic.config.policy import LoraConfig, PolicyConfig
from megatron_entropic.models.dimensions import ModelDimensions, read_dimensions
from megatron_entropic.models.read_config import ExpertDimensions

__all__ = ["machine"]


def test_an_adapter_to_begin_with_is_an_absolute_path(machine: Path) -> None:
    config = load_config(write(machine), ["policy.lora.rank=4", "policy.lora.adapter_dir=adapter"])
    assert config.policy.lora.adapter_dir == machine / "adapter"


def test_everything_that_is_wrong_with_adapters_is_said_at_once(machine: Path) -> None:
    lora = {"rank": 4, "target_modules": ["q_proj", "o_proj", "q_proj"]}
    found = problems_of(write(machine, policy={"lora": lora, "fp8": "e4m3"}), check_machine=False)
    assert "policy.lora.target_modules names q_proj twice" in found
    assert any("policy.fp8=e4m3 with policy.lora.rank=4" in problem for problem in found)
    assert problems_of(write(machine, policy={"lora": {"alpha": 8.0, "adapter_dir": "x"}}), check_machine=False) == [
        "policy.lora.adapter_dir, policy.lora.alpha has no use with policy.lora.rank=0, which trains the weights "
        "themselves"
    ]
    (problem,) = problems_of(write(machine, policy={"lora": {"rank": 2, "target_modules": ["w1"]}}))
    assert "policy.lora.target_modules" in problem


def test_more_rank_than_the_model_is_wide_is_refused_before_a_start(machine: Path) -> None:
    wide = QWEN3["hidden_size"] + 1
    found = problems_of(write(machine), f"policy.lora.rank={wide}")
    assert any(f"lora.rank={wide} is more than the model's hidden_size" in problem for problem in found)


@pytest.fixture
def dimensions(machine: Path) -> ModelDimensions:
    return read_dimensions(machine / "model")


def test_experts_get_no_adapters_but_attention_beside_them_does(dimensions: ModelDimensions) -> None:
    experts = ExpertDimensions(count=4, per_token=2, ffn_hidden_size=8, renormalised=True)
    sparse = dataclasses.replace(dimensions, experts=experts)
    (problem,) = sparse.layout_problems(PolicyConfig(lora=LoraConfig(rank=2)))
    assert problem.startswith("lora.target_modules names gate_proj, up_proj, down_proj, and experts get no adapters")
    attention = LoraConfig(rank=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert sparse.layout_problems(PolicyConfig(lora=attention)) == []


def test_the_reference_is_the_policy_itself_unless_another_is_named(machine: Path) -> None:
    path = write(machine, policy={"lora": {"rank": 2}}, algorithm={"kl": {"coefficient": 0.1}})
    config = load_config(path)
    assert config.reference_is_the_start
    assert config.frozen_copies == {}
    kl = AlgorithmConfig(kl={"coefficient": 0.1, "reference_hf_dir": "other"})
    assert config.model_copy(update={"algorithm": kl}).frozen_copies == {"reference": Path("other")}
    every_weight = config.model_copy(update={"policy": config.policy.without_adapters})
    assert every_weight.frozen_copies == {"reference": None}
