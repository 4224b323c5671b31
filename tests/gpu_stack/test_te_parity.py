"""A policy of Transformer Engine's layers, run through its Python on emulated bindings, scores and trains rightly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from modules import load_module

DISTRIBUTED = Path(__file__).resolve().parents[1] / "distributed"
RUNNER = Path(__file__).with_name("emulated_ranks.py")


def _load(name: str) -> ModuleType:
    """A module of tests/distributed, under a name that no other conftest has."""
    sys.path.insert(0, str(DISTRIBUTED))
    return load_module(DISTRIBUTED / f"{name}.py", f"distributed_{name}")


ranks_of_tests, scores, updates = _load("conftest"), _load("test_score_parity"), _load("test_update_parity")
offload, replay = _load("test_offload"), _load("test_router_replay")
SCORED: dict[str, dict[str, Any]] = {
    "dp2": {"data_parallel": 2, "tokens_per_microbatch": 60},
    "full recomputation": {"data_parallel": 2, "recompute": "full"},
    "cp2": {"context_parallel": 2, "tokens_per_microbatch": 60},
    "tp2": {"tensor_parallel": 2, "tokens_per_microbatch": 60},
    "tp2 sp": {"tensor_parallel": 2, "sequence_parallel": True, "tokens_per_microbatch": 60},
    "pp2": {"pipeline_parallel": 2, "tokens_per_microbatch": 60},
    "pp2 vpp2": {"pipeline_parallel": 2, "virtual_pipeline_parallel": 2, "tokens_per_microbatch": 60},
}
SCORED_EXPERTS = {
    **{name: SCORED[name] for name in ("dp2", "cp2", "tp2 sp", "pp2")},
    "ep2": {"data_parallel": 2, "expert_parallel": 2, "tokens_per_microbatch": 60},
    "ep2 tp2 sp, experts whole": {**SCORED["tp2 sp"], "expert_parallel": 2, "expert_tensor_parallel": 1},
}
FAMILIES = {
    **dict.fromkeys(("qwen3", "qwen2", "llama"), SCORED),
    **dict.fromkeys(("qwen3_moe", "mixtral", "deepseek_v3", "moonlight"), SCORED_EXPERTS),
}
DENSE = ("token-mean high", "seq-mean-token-mean", "tied embeddings and biases")
UPDATED: dict[str, dict[str, Any]] = {
    "dp2": updates._layout(DENSE, ("plain", "distributed")),
    "dp2, recomputed logits": updates._layout(DENSE[:1], (), output_head="recompute"),
    "dp2, stored logits": updates._layout(DENSE[:1], (), output_head="logits"),
    "tp2 sp": updates._layout(DENSE, tensor_parallel=2, sequence_parallel=True),
    "cp2": updates._layout((*DENSE, *updates.EXPERTS[:1]), context_parallel=2),
    "pp2": updates._layout(DENSE[:1], pipeline_parallel=2, recompute="full"),
    "dp2, adapters": updates._adapters(),
    "tp2 sp, adapters": updates._adapters((), tensor_parallel=2, sequence_parallel=True, recompute="selective"),
    "ep2": updates._experts(("distributed",), expert_parallel=2),
    "ep2 tp2 sp, experts whole": updates._experts(
        (), tensor_parallel=2, sequence_parallel=True, expert_parallel=2, expert_tensor_parallel=1
    ),
}


class FreshRanks:
    """As tests/distributed's RankServer, but that each rank has an interpreter of its own.

    The bindings must be emulated before anything of megatron-core is imported, which that server does before it forks.
    """

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, command: list[str], ranks: list[dict[str, Any]]) -> list[int]:
        """Process ids of new ranks, each the leader of a process group."""
        started = []
        for rank in ranks:
            with open(rank["stdout"], "wb") as stdout, open(rank["stderr"], "wb") as stderr:
                process = subprocess.Popen(
                    [sys.executable, *command],
                    env={**os.environ, **ranks_of_tests.ONE_THREAD, **rank["environment"]},
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
            self._processes[process.pid] = process
            started.append(process.pid)
        return started

    def poll(self, ranks: list[int]) -> list[int | None]:
        """Exit statuses; None for a rank that runs."""
        return [self._processes[rank].poll() for rank in ranks]


@pytest.fixture
def run_emulated(tmp_path: Path) -> Callable[..., list[str]]:
    """As tests/distributed's `run_ranks`, on layers of Transformer Engine."""
    run = ranks_of_tests._runner(FreshRanks(), tmp_path)

    def emulated(script: Path, world_size: int, *arguments: object, **_: Any) -> list[str]:
        return run(RUNNER, world_size, script, *arguments, timeout_s=2000)

    return emulated


@pytest.mark.timeout(2400)
def test_scores_agree_with_transformers(run_emulated: Callable[..., list[str]], tmp_path: Path) -> None:
    sequences = scores.random_sequences()
    for family in FAMILIES:
        scores.write_tiny_model(family, tmp_path / family)
        reference = scores.transformers_statistics(tmp_path / family, sequences, scores.TEMPERATURE)
        case = {"sequences": sequences, "reference": reference, "temperature": scores.TEMPERATURE}
        torch.save(case, tmp_path / f"{family}.pt")
    (tmp_path / "cases.json").write_text(json.dumps(FAMILIES))
    outputs = run_emulated(DISTRIBUTED / "scripts/score_layouts.py", 2, tmp_path)
    last = json.loads(outputs[-1])
    assert set(last) == {f"{family} {layout}" for family, layouts in FAMILIES.items() for layout in layouts}
    for case, statistics in last.items():
        for distance, different, _ in statistics:
            assert distance < scores.TOLERANCE, case
            assert different > 0, f"{case}: bit-equal, so nothing was compared"


@pytest.mark.timeout(2400)
def test_updates_agree_with_autograd_in_float64(run_emulated: Callable[..., list[str]], tmp_path: Path) -> None:
    directory, expected = updates._prepare(tmp_path)
    saved_path = tmp_path / "saved.pt"
    script = DISTRIBUTED / "scripts/update_layouts.py"
    outputs = run_emulated(script, 2, directory, json.dumps(UPDATED), saved_path)
    reports, saved = [json.loads(output) for output in outputs], torch.load(saved_path)
    assert len(saved) == sum(len(layout["cases"]) + len(layout["train"]) for layout in UPDATED.values())
    for name, layout in UPDATED.items():
        for case in layout["cases"]:
            label = f"{name}/{case}"
            updates._check_metrics([report[label]["metrics"] for report in reports], expected[case], label)
            updates._check_tensors(saved[label], expected[case]["gradients"], label)
        for kind in layout["train"]:
            label = f"{name}/train/{kind}"
            traces = [report[label]["trace"] for report in reports]
            updates._check_training(traces, saved[label], expected[f"train {layout['train_case']}"], label)


@pytest.mark.timeout(2400)
def test_memory_given_back_between_steps_changes_no_bit(run_emulated: Callable[..., list[str]], tmp_path: Path) -> None:
    offload.test_training_does_not_depend_on_what_leaves_the_device(run_emulated, tmp_path, 1)


@pytest.mark.timeout(2400)
def test_updates_use_the_experts_of_the_score_pass(run_emulated: Callable[..., list[str]], tmp_path: Path) -> None:
    families = ("qwen3_moe", "deepseek_v3")
    models = {family: str(replay.write_tiny_model(family, tmp_path / family)) for family in families}
    replay.test_updates_use_the_experts_of_the_score_pass(run_emulated, models, 1)
