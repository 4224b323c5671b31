"""examples/study/methods.yaml: every method is there, and every run of it can start."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from megatron_entropic.algorithms import POLICY_LOSSES
from megatron_entropic.algorithms.entropy_control import CONTROLLERS
from megatron_entropic.config.algorithm import AlgorithmConfig, EntropyControlConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "study"))

import methods as study_methods


@pytest.fixture(scope="module")
def shipped() -> study_methods.Methods:
    content = yaml.safe_load((study_methods.HERE / "methods.yaml").read_text(encoding="utf-8"))
    return study_methods.Methods.model_validate(content)


def used(shipped: study_methods.Methods, key: str) -> set[object]:
    return {shipped.overrides(name).get(key) for name in shipped.methods}


def test_every_shipped_method_can_run(shipped: study_methods.Methods) -> None:
    assert shipped.steps == 30
    assert shipped.problems() == []
    places = {study_methods.directory_of(shipped, name, Path("runs")) for name in shipped.methods}
    assert len(places) == len(shipped.methods)


def test_every_method_is_shipped(shipped: study_methods.Methods) -> None:
    default = {"pi", "clipped", "grpo", "conditional", "immediately"}
    assert used(shipped, "entropy_control.controller") | default >= {*CONTROLLERS, "off"}
    assert used(shipped, "algorithm.policy_loss") | default >= set(POLICY_LOSSES)
    for key, section in (
        ("algorithm.advantage", AlgorithmConfig),
        ("entropy_control.anti_windup", EntropyControlConfig),
        ("entropy_control.start", EntropyControlConfig),
    ):
        choices = set(get_args(section.model_fields[key.rpartition(".")[2]].annotation))
        assert used(shipped, key) | default >= choices, key


def test_unfinished_methods_are_in_the_table(shipped: study_methods.Methods, tmp_path: Path) -> None:
    lines = list(study_methods.table(shipped, tmp_path))
    assert len(lines) == 2 + len(shipped.methods)
    assert lines[2] == "| off | not finished | | | | | |"
