"""Router replay: an update sends every token to the experts that the score pass chose, however both are laid out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import random_sequences, write_tiny_model

SCRIPT = Path(__file__).parent / "scripts" / "router_replay.py"
PLAIN = {"distributed_optimizer": False}
LAYOUTS = {
    1: {"one rank": PLAIN, "full recomputation": PLAIN | {"recompute": "full"}},
    4: {
        "ep2 tp2 sp": PLAIN | {"expert_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True},
        "ep2 pp2 vpp2, full recomputation": PLAIN
        | {"expert_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline_parallel": 2, "recompute": "full"},
        "ep2 over cp2, pp2": PLAIN | {"expert_parallel": 2, "context_parallel": 2, "pipeline_parallel": 2},
    },
}


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("qwen3_moe", tmp_path_factory.mktemp("replay") / "model")


@pytest.mark.parametrize("world_size", [1, 4])
def test_updates_use_the_experts_of_the_score_pass(run_ranks, hf_dir, world_size):
    layouts = LAYOUTS[world_size]
    outputs = run_ranks(SCRIPT, world_size, hf_dir, json.dumps(random_sequences()), json.dumps(layouts))
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
