"""A teacher is checked before anything starts: layout, vocabulary, lengths, and what alpha acts on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_qwen3 import QWEN3

from megatron_entropic.config.checks import violations
from megatron_entropic.config.run import Config
from megatron_entropic.training.machine import machine_violations

KEY = "algorithm.distillation"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with the policy's config.json and a teacher's."""
    for name in ("model", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(QWEN3))
    return tmp_path


def problems(models: Path, distillation: dict[str, Any], check: Any = violations, **sections: Any) -> list[str]:
    config = Config.model_validate(
        {
            "model": {"hf_dir": models / "model"},
            "data": {"train_files": ["unused"], "max_prompt_tokens": 16},
            "rollout": {"prompts_per_step": 8, "max_response_tokens": 16},
            "algorithm": {"distillation": distillation},
            **sections,
        }
    )
    return [violation.message for violation in check(config) if KEY in violation.message]


def test_a_teacher_must_fit_the_policys_layout_vocabulary_and_lengths(models: Path) -> None:
    teacher = models / "teacher"
    named = f"{KEY}.teacher_hf_dir={teacher}"
    short = f"{named}: its positions end at 31, and sequences have up to 32 tokens"
    here = {"teacher_hf_dir": teacher}
    assert problems(models, here, machine_violations) == []
    for vocabulary, also in ((16, "at least as many"), (18, None)):
        sizes = {"vocab_size": vocabulary, "num_hidden_layers": 3, "max_position_embeddings": 31}
        (teacher / "config.json").write_text(json.dumps(QWEN3 | sizes))
        count = f"{named} has {vocabulary} token ids, the policy 17: it needs "
        layout, *found = problems(models, here, machine_violations, policy={"pipeline_parallel": 2})
        assert layout.startswith(f"{named} has the policy's layout, and policy.pipeline_parallel=2 does not divide")
        assert found == ([f"{count}{also}", short] if also else [short])
        lossy = problems(models, here | {"term": "loss"}, machine_violations)
        assert lossy == [f"{count}as many, since shards of both vocabularies are compared", short]
    (teacher / "config.json").write_text("{")
    (damaged,) = problems(models, here, machine_violations)
    assert damaged.startswith(f"{KEY}.teacher_hf_dir: ")
    (absent,) = problems(models, {"teacher_hf_dir": models / "nowhere"}, machine_violations)
    assert absent.startswith(f"{KEY}.teacher_hf_dir=")


def test_settings_without_a_teacher_have_no_use(models: Path) -> None:
    assert problems(models, {"term": "loss"}) == [
        f"{KEY} has no use without teacher_hf_dir, the directory of the teacher"
    ]


def test_alpha_has_nothing_to_act_on_when_all_advantages_are_0(models: Path) -> None:
    alone = {"teacher_hf_dir": models / "teacher", "reward_weight": 0}
    (problem,) = problems(models, alone | {"term": "loss"})
    assert "every advantage is 0, and alpha of entropy_control.controller=pi acts on advantages" in problem
    assert problems(models, alone) == []
    assert problems(models, alone | {"term": "loss"}, entropy_control={"controller": "off"}) == []
