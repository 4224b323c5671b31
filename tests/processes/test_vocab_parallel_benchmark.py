"""benchmarks/vocab_parallel.py from end to end with tiny shapes: everything is measured, and what is exact is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOGITS = {"textbook", "ours, eager", "ours, eager, layout_invariant"}
HEADS = {"GEMM + ours", "GEMM + textbook", "fused, recompute", "fused, gradient in forward"}


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A benchmark as a user would start it."""
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one quick run has written."""
    path = tmp_path_factory.mktemp("benchmark")
    result = run("vocab_parallel.py", "--quick", "--output-dir", str(path))
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def trials(folder: Path) -> list[dict[str, Any]]:
    """Its measurements."""
    return json.loads((folder / "vocab_parallel.json").read_text())


def test_everyone_takes_part_and_is_in_the_tables(folder: Path, trials: list[dict[str, Any]]) -> None:
    page = (folder / "vocab_parallel.md").read_text()
    for ranks in (1, 2):
        found = {trial["contender"] for trial in trials if trial["case"]["ranks"] == ranks}
        assert found == LOGITS | HEADS | ({"torch log_softmax"} if ranks == 1 else set())
        assert all(f"| {name} |" in page for name in found)
    assert "Triton backend and Liger: they need a GPU" in page
    assert (folder / "vocab_parallel_memory.png").stat().st_size > 10_000


def test_collectives_and_bytes(trials: list[dict[str, Any]]) -> None:
    """One collective of 16 bytes per token and rank forward, none backward."""
    sharded = [trial for trial in trials if trial["case"]["ranks"] == 2]
    plain = [trial for trial in sharded if trial["contender"] == "ours, eager"]
    assert plain
    for trial in plain:
        assert trial["collectives"] == [1, 0]
        assert trial["sent_bytes"] == [16 * trial["case"]["tokens"], 0]
    assert all(trial["collectives"] == [6, 0] for trial in sharded if trial["contender"] == "textbook")
    for trial in sharded:
        if trial["contender"] == "fused, recompute":
            assert trial["collectives"] == [1, 1]
            assert trial["sent_bytes"][0] == 16 * trial["case"]["tokens"]


def test_everyone_computes_the_same(trials: list[dict[str, Any]]) -> None:
    """A contender that computes something else would win for nothing. The textbook loses digits at an offset."""
    for trial in trials:
        errors, case = trial["errors"], trial["case"]
        exact = case["dtype"] == "float32" and not case["offset"]
        assert errors["logprob"] <= 1e-5
        assert errors["entropy"] <= (5e-6 if trial["contender"].startswith(("ours", "fused")) else 1e-3)
        assert errors["gradient"] <= (1e-5 if exact else 1e-2)


def test_gpu_script_says_what_it_lacks() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run("gpu/vocab_parallel_gpu.py")
    assert result.returncode == 2
    assert result.stderr == "error: this benchmark needs a GPU and torch finds none\n"


def test_gpu_script_runs_with_tiny_sizes(tmp_path: Path) -> None:
    result = run("gpu/vocab_parallel_gpu.py", "--device", "cpu", "--repetitions", "1", "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "vocab_parallel_gpu.md").read_text()
    assert all(f"| {name} |" in page for name in LOGITS | HEADS)
