"""Memory given back between steps: it leaves the device, and every bit of training is as if it had stayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import random_sequences, write_tiny_model

SCRIPT = Path(__file__).parent / "scripts" / "offload.py"
RUNS = {
    1: {
        "float32, plain": ("qwen3", "float32", {"distributed_optimizer": False}, 0.0),
        "bfloat16, reference": ("qwen2", "bfloat16", {}, 0.05),
    },
    2: {
        "float32, distributed": ("qwen2", "float32", {}, 0.0),
        "bfloat16, distributed": ("qwen2", "bfloat16", {}, 0.0),
        "bfloat16, gradients too": ("qwen2", "bfloat16", {"gradient_dtype": "bfloat16"}, 0.0),
        "bfloat16, plain": ("qwen3", "bfloat16", {"distributed_optimizer": False}, 0.0),
        "bfloat16, experts": ("qwen3_moe", "bfloat16", {"expert_parallel": 2}, 0.0),
        "bfloat16, stages": (
            "qwen3",
            "bfloat16",
            {"pipeline_parallel": 2, "virtual_pipeline_parallel": 2},
            0.0,
        ),
    },
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_does_not_depend_on_what_leaves_the_device(run_ranks, tmp_path, world_size):
    runs = []
    for number, (name, (family, dtype, policy, kl)) in enumerate(RUNS[world_size].items()):
        hf_dir = tmp_path / family
        if not hf_dir.exists():
            write_tiny_model(family, hf_dir)
        folder = tmp_path / f"checkpoints-{number}"
        folder.mkdir()
        runs.append({"name": name, "hf_dir": str(hf_dir), "dtype": dtype, "policy": policy, "kl": kl})
        runs[-1]["folder"] = str(folder)
    outputs = run_ranks(SCRIPT, world_size, json.dumps(random_sequences()), json.dumps(runs))
    for report in (json.loads(output) for output in outputs):
        if world_size == 2:
            _compare_sums_of_gradients(report)
        for name in RUNS[world_size]:
            stayed, optimizer, everything = (
                report[f"{name}/{parts}"] for parts in ("", "optimizer", "optimizer+gradients+parameters")
            )
            assert optimizer["trace"] == everything["trace"] == stayed["trace"], name
            assert optimizer["digest"] == everything["digest"] == stayed["digest"], name
            assert everything["resumed"] == stayed["digest"], name
            for found, parts in ((optimizer, ["optimizer"]), (everything, ["optimizer", "gradients", "parameters"])):
                whole = stayed["whole"]
                assert all(whole.values()), name
                assert found["left"] == [sum(whole[part] for part in parts)] * len(found["left"]), name
                for held in found["held"]:
                    assert held == {part: 0 if part in parts else size for part, size in whole.items()}, name
                # Scoring needs parameters only.
                assert found["after_score"] == {
                    part: 0 if part in parts and part != "parameters" else size for part, size in whole.items()
                }, name


def _compare_sums_of_gradients(report):
    """Sums in bfloat16 are those in float32 rounded to 8 bits, and take half of their memory."""
    exact, rounded = (report[f"bfloat16, {name}/"] for name in ("distributed", "gradients too"))
    assert rounded["whole"]["gradients"] == exact["whole"]["gradients"] / 2
    before, now = (float.fromhex(one["trace"][0]["grad_norm"]) for one in (exact, rounded))
    assert now != before
    assert now == pytest.approx(before, rel=0.01)
