"""The score pass of every family under every layout against transformers, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import LENGTHS, random_sequences, transformers_statistics, write_tiny_model

SCRIPTS = Path(__file__).parent / "scripts"
TEMPERATURE = 0.7
FAMILIES = ("qwen3", "qwen2", "llama")
# Data parallelism fills up four ranks, so that one launch serves all layouts; micro-batches of 60 tokens hold one to
# several sequences each.
LAYOUTS = {
    "tp1": {"data_parallel": 4, "tokens_per_microbatch": 60},
    "tp1 one micro-batch": {"data_parallel": 4},
    "tp1 whole sequences": {"data_parallel": 4, "tokens_per_microbatch": 60, "prefix_sharing": "off"},
    "tp2": {"tensor_parallel": 2, "data_parallel": 2, "tokens_per_microbatch": 60},
    "tp2 sp": {"tensor_parallel": 2, "data_parallel": 2, "sequence_parallel": True, "tokens_per_microbatch": 60},
    "pp2": {"pipeline_parallel": 2, "data_parallel": 2, "tokens_per_microbatch": 60},
    "tp2 pp2": {"tensor_parallel": 2, "pipeline_parallel": 2, "tokens_per_microbatch": 60},
    "tp2 pp2 sp": {
        "tensor_parallel": 2,
        "pipeline_parallel": 2,
        "sequence_parallel": True,
        "tokens_per_microbatch": 60,
    },
    "cp2": {"context_parallel": 2, "data_parallel": 2, "tokens_per_microbatch": 60},
    "cp4": {"context_parallel": 4},
    "cp2 tp2 sp": {
        "context_parallel": 2,
        "tensor_parallel": 2,
        "sequence_parallel": True,
        "tokens_per_microbatch": 60,
    },
    "pp4": {"pipeline_parallel": 4, "tokens_per_microbatch": 60},
    "pp2 vpp2": {
        "pipeline_parallel": 2,
        "virtual_pipeline_parallel": 2,
        "data_parallel": 2,
        "tokens_per_microbatch": 60,
    },
    "pp2 vpp2 cp2": {
        "pipeline_parallel": 2,
        "virtual_pipeline_parallel": 2,
        "context_parallel": 2,
        "tokens_per_microbatch": 60,
    },
    "pp2 of 3 and 1 layers": {
        "pipeline_parallel": 2,
        "first_stage_layers": 3,
        "data_parallel": 2,
        "tokens_per_microbatch": 60,
    },
    "cp2 pp2": {"context_parallel": 2, "pipeline_parallel": 2, "tokens_per_microbatch": 60},
}
EXPERT_FAMILIES = ("qwen3_moe", "mixtral")
EXPERT_LAYOUTS = {
    "tp1": LAYOUTS["tp1"],
    "tp2 sp": LAYOUTS["tp2 sp"],
    "tp2 pp2 sp": LAYOUTS["tp2 pp2 sp"],
    "ep2": {"data_parallel": 4, "expert_parallel": 2, "tokens_per_microbatch": 60},
    "ep2 pp2": {"pipeline_parallel": 2, "data_parallel": 2, "expert_parallel": 2, "tokens_per_microbatch": 60},
    "ep2 pp2 of 1 and 3 layers": {
        "pipeline_parallel": 2,
        "first_stage_layers": 1,
        "last_stage_layers": 3,
        "data_parallel": 2,
        "expert_parallel": 2,
        "tokens_per_microbatch": 60,
    },
    "ep2 tp2 sp": {**LAYOUTS["tp2 sp"], "expert_parallel": 2},
    "ep2 tp2 sp, experts whole": {**LAYOUTS["tp2 sp"], "expert_parallel": 2, "expert_tensor_parallel": 1},
}
LATENT_LAYOUTS = {
    **EXPERT_LAYOUTS,
    "cp2 tp2 sp": LAYOUTS["cp2 tp2 sp"],
    "pp2 vpp2 cp2": LAYOUTS["pp2 vpp2 cp2"],
}
"""Of latent attention, which cuts and gathers other tensors than attention does elsewhere."""
CASES = {
    **dict.fromkeys(FAMILIES, LAYOUTS),
    **dict.fromkeys(EXPERT_FAMILIES, EXPERT_LAYOUTS),
    "deepseek_v3": LATENT_LAYOUTS,
    "moonlight": {name: EXPERT_LAYOUTS[name] for name in ("tp2 sp", "ep2 pp2")},
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, sequences and transformers' statistics, for the ranks to find."""
    directory = tmp_path_factory.mktemp("score_parity")
    sequences = random_sequences()
    for family in CASES:
        write_tiny_model(family, directory / family)
        reference = transformers_statistics(directory / family, sequences, TEMPERATURE)
        case = {"sequences": sequences, "reference": reference, "temperature": TEMPERATURE}
        torch.save(case, directory / f"{family}.pt")
    (directory / "cases.json").write_text(json.dumps(CASES))
    return directory


def test_every_layout_agrees_with_transformers(run_ranks, cases):
    distances_of_ranks = [json.loads(text) for text in run_ranks(SCRIPTS / "score_layouts.py", 4, cases)]
    last = distances_of_ranks[-1]
    assert set(last) == {f"{family} {layout}" for family, layouts in CASES.items() for layout in layouts}
    tokens = sum(response for _, response in LENGTHS)
    for distances in distances_of_ranks:
        for case, statistics in distances.items():
            for name, (distance, different, count) in zip(("log-prob", "entropy"), statistics, strict=True):
                assert count == tokens
                assert distance < TOLERANCE, f"{case}: {name} is off by {distance}"
                assert different > 0, f"{case}: {name} is bit-equal, so nothing was compared"
