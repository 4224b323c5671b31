"""Converted checkpoints load into real models under every layout, and what megatron-core saves converts back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_sequences, transformers_statistics, write_tiny_model

from megatron_entropic.checkpoints.convert import hf_to_megatron, megatron_to_hf

SCRIPT = Path(__file__).parent / "scripts/conversion_layouts.py"
TEMPERATURE = 0.7
TOLERANCE = 1e-5
DTYPES = ("float32", "bfloat16")
# Four ranks; data parallelism fills them up. 251 tokens of vocabulary are padded where there are two tensor ranks.
LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "pp4": {"pipeline_parallel": 4},
    "tp2 pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "tp2 pp2 sp": {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
    "pp2 vpp2": {"pipeline_parallel": 2, "virtual_pipeline_parallel": 2},
}
EXPERT_LAYOUTS = {
    "ep2": {"expert_parallel": 2},
    "ep2 tp2": {"expert_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True},
    "ep2 pp2": {"expert_parallel": 2, "pipeline_parallel": 2},
    "ep2 pp2 of 3 and 1 layers": {"expert_parallel": 2, "pipeline_parallel": 2, "first_stage_layers": 3},
    "ep2 pp2 vpp2": {"expert_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline_parallel": 2},
    "tp2 pp2 sp": {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
    "ep2 tp2 pp2 etp1": {
        "expert_parallel": 2,
        "expert_tensor_parallel": 1,
        "tensor_parallel": 2,
        "pipeline_parallel": 2,
        "sequence_parallel": True,
    },
}
SAVED = {
    "qwen2 tp2": "run",
    "qwen2 tp2 pp2": "plain",
    "qwen2 pp2": "prefixed",
    "llama pp2 vpp2": "plain",
    "llama pp2": "script",
    "qwen3 tp2 pp2": "single",
    "qwen3 pp4": "run",
    "qwen3_moe ep2 tp2": "run",
    "qwen3_moe ep2 pp2 vpp2": "plain",
    "qwen3_moe ep2 tp2 pp2 etp1": "single",
    "mixtral ep4": "run",
    "qwen3_moe ep2 pp2 of 3 and 1 layers": "run",
    "deepseek_v3 ep2 tp2": "run",
    "mixtral ep2 pp2": "prefixed",
}
"""Case and form of what is saved: tied and untied, padded and not, as a run or Megatron-LM's training script does it,
with a prefix, one key per layer."""
CASES = {
    **{f"qwen2 {name}": {"family": "qwen2", "layout": layout} for name, layout in LAYOUTS.items()},
    "qwen3 tp2 pp2": {"family": "qwen3", "layout": LAYOUTS["tp2 pp2"]},
    "qwen3 pp4": {"family": "qwen3", "layout": LAYOUTS["pp4"]},
    "llama pp2 vpp2": {"family": "llama", "layout": LAYOUTS["pp2 vpp2"]},
    "llama pp2": {"family": "llama", "layout": LAYOUTS["pp2"], "megatron_start": True},
    "qwen2 tp2 pp2 bfloat16": {"family": "qwen2", "layout": LAYOUTS["tp2 pp2"], "dtype": "bfloat16"},
    **{f"qwen3_moe {name}": {"family": "qwen3_moe", "layout": layout} for name, layout in EXPERT_LAYOUTS.items()},
    "mixtral ep4": {"family": "mixtral", "layout": {"expert_parallel": 4}},
    "mixtral ep2 pp2": {"family": "mixtral", "layout": EXPERT_LAYOUTS["ep2 pp2"]},
    "deepseek_v3 ep2 tp2": {"family": "deepseek_v3", "layout": EXPERT_LAYOUTS["ep2 tp2"]},
    "deepseek_v3 ep2 pp2 bfloat16": {
        "family": "deepseek_v3",
        "layout": EXPERT_LAYOUTS["ep2 pp2"],
        "dtype": "bfloat16",
    },
    "mixtral ep2 tp2 bfloat16": {"family": "mixtral", "layout": EXPERT_LAYOUTS["ep2 tp2"], "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, run_ranks_once) -> tuple[Path, list[dict[str, Any]]]:
    """Directory with everything the ranks saved, and what each of them found in each case."""
    directory = tmp_path_factory.mktemp("conversion")
    sequences = random_sequences()
    for family in sorted({case["family"] for case in CASES.values()}):
        write_tiny_model(family, directory / family)
        reference = transformers_statistics(directory / family, sequences, TEMPERATURE)
        case = {"sequences": sequences, "reference": reference, "temperature": TEMPERATURE}
        torch.save(case, directory / f"{family}.pt")
        for dtype in DTYPES:
            hf_to_megatron(directory / family, directory / f"{family}_{dtype}", dtype=getattr(torch, dtype))
    cases = {name: {"dtype": "float32", **case, "save": SAVED.get(name, "")} for name, case in CASES.items()}
    (directory / "cases.json").write_text(json.dumps(cases))
    return directory, [json.loads(text) for text in run_ranks_once(SCRIPT, 4, directory)]


def test_conversions_load_bit_for_bit_under_every_layout(work):
    for found in work[1]:
        assert found.keys() == CASES.keys()
        for case, one in found.items():
            assert one["parameters"] > 5
            assert one["by megatron-core"] == [], case
            assert one["as a start"] == [], case


def test_whatever_megatron_core_saved_is_a_start(work):
    for found in work[1]:
        assert {name: one["saved"] for name, one in found.items() if "saved" in one} == {name: [] for name in SAVED}


def test_their_logits_are_those_of_transformers(work):
    compared = {name: one["distance"] for found in work[1] for name, one in found.items() if "distance" in one}
    assert compared.keys() == {name for name, case in CASES.items() if case.get("dtype") != "bfloat16"}
    for case, distance in compared.items():
        assert distance < TOLERANCE, f"{case}: off by {distance}"


@pytest.mark.parametrize("name", SAVED)
def test_what_megatron_core_saved_converts_back(work, tmp_path, name):
    family = CASES[name]["family"]
    original = work[0] / family
    megatron_to_hf(work[0] / "saved" / name, tmp_path / "back", template_dir=original)
    wanted, found = (load_file(path / "model.safetensors") for path in (original, tmp_path / "back"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())
