"""Router replay: an update sends every token to the experts that the score pass chose, however both are laid out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_sequences, write_tiny_model

SCRIPT = Path(__file__).parent / "scripts" / "router_replay.py"
LAYOUTS: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    1: {
        "one rank": ("qwen3_moe", {}),
        "full recomputation, experts in groups": ("deepseek_v3", {"recompute": "full"}),
    },
    4: {
        "ep2 tp2 sp": ("qwen3_moe", {"expert_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True}),
        "ep2 pp2 vpp2, full recomputation": (
            "qwen3_moe",
            {"expert_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline_parallel": 2, "recompute": "full"},
        ),
        "ep2 over cp2, pp2": ("qwen3_moe", {"expert_parallel": 2, "context_parallel": 2, "pipeline_parallel": 2}),
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("replay")
    return {family: str(write_tiny_model(family, folder / family)) for family in ("qwen3_moe", "deepseek_v3")}


@pytest.mark.parametrize("world_size", [1, 4])
def test_updates_use_the_experts_of_the_score_pass(run_ranks, models, world_size):
    layouts = {
        name: {"hf_dir": models[family], "policy": {"distributed_optimizer": False, **layout}}
        for name, (family, layout) in LAYOUTS[world_size].items()
    }
    outputs = run_ranks(SCRIPT, world_size, json.dumps(random_sequences()), json.dumps(layouts))
    reports = [json.loads(output) for output in outputs]
    for name in layouts:
        for report in (report[name] for report in reports):
            assert report["unmoved, free"], name
            assert report["unmoved"], name
            assert report["unmoved gradients"], f"{name}: replay of the router's own choices changed a gradient"
            assert report["unmoved differs"] == 0.0, name
            assert not report["moved, free"], f"{name}: the move changed no choice"
            assert not report["free metric"], name
            assert report["moved"], f"{name}: the update used another expert than the score pass"
            assert report["moved, rescored"], name
            assert 0.02 < report["moved differs"] < 0.9, name
            assert report["counted"] == pytest.approx(report["moved differs"], rel=0.2), name
            assert "lacks the experts" in report["refusal"]
        assert reports[0][name]["gradients"] > 20
