"""A real vLLM engine of two workers and its own IPC weight transfer, on a CPU: all but CUDA's handles."""

from __future__ import annotations

import json
from pathlib import Path

from math_assets import write_model
from training_run import run_script

SCRIPT = Path(__file__).parent / "scripts" / "ipc_engine_run.py"


def test_every_tensor_arrives_through_the_buffers_of_the_ranks_on_the_same_gpus(tmp_path: Path) -> None:
    # On a CPU vLLM packs a tied head, and only this project's gloo engine packs it again.
    write_model(tmp_path / "model", tied=False)
    finished = run_script(SCRIPT, tmp_path / "model", tmp_path / "seen.json")
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-5000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["buckets"] > 4, "each of the two buffers has to be used again"
    for connection in range(2):
        for version in (2, 3):
            assert seen[f"connection {connection}, version {version}"] == [[], version]
    engine, *ranks, generation = seen["failure"]
    assert "IPC handle not found for GPU UUID GPU-" in engine
    assert len(ranks) == 2, "every rank is told"
    assert all("was told by the engine on its GPU: " in rank and "IPC handle not found" in rank for rank in ranks)
    assert "weights are incomplete" in generation
