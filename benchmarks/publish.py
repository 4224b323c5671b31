"""Publishing weights from a TP=2 x PP=2 policy to a vLLM engine, beside one gloo broadcast of the same bytes.

    python benchmarks/publish.py [--output-dir DIR] [--models NAME [NAME ...]] [--engine-workers N [N ...]]

Four policy ranks and the engine's workers are processes of this machine. In turn, over and over: rank 0 broadcasts a
buffer of all the model's bytes to as many other ranks as the engine has workers, bare torch.distributed; then the
policy publishes, from its first gather until the engine could sample. After the last publication the weights inside
the engine are compared with what they must be, and the log-probs of its samples with those of transformers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import markdown_table
from benchmarks.policies import ModelSize
from benchmarks.publish_case import CaseResult, measure_case
from benchmarks.ranks import ENVIRONMENT

MODELS = {
    "10M": ModelSize(layers=4, hidden=384, ffn=1024, heads=4, vocab=4096),
    "10M, 3x layers": ModelSize(layers=12, hidden=256, ffn=640, heads=4, vocab=4096),
    "50M": ModelSize(layers=8, hidden=640, ffn=1920, heads=8, vocab=8192),
    "100M": ModelSize(layers=12, hidden=768, ffn=2560, heads=8, vocab=8192),
    "200M": ModelSize(layers=14, hidden=1024, ffn=3328, heads=8, vocab=8192),
}


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    os.environ.update(ENVIRONMENT)  # inherited by the processes of every case
    results = []
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "publish.md"
    for workers in options.engine_workers:
        for name in options.models:
            # An engine never returns all it took: every case is a process of its own.
            with (
                tempfile.TemporaryDirectory() as folder,
                ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as case,
            ):
                result = case.submit(
                    measure_case, name, MODELS[name], workers, Path(folder), options.bucket_mib, options.repetitions
                ).result()
            results.append(result)
            console.print(_row(result))
            path.write_text(_table(results), encoding="utf-8")
    console.print(f"wrote {path}")
    return 0


def _row(result: CaseResult) -> list[str]:
    ratios = sorted(published / raw for published, raw in zip(result.publish_s, result.raw_s, strict=True))
    return [
        result.name,
        str(result.engine_workers),
        f"{result.bytes / 2**20:.0f}",
        str(result.tensors),
        str(result.buckets),
        str(result.collectives),
        f"{_median(result.raw_s):.3f}",
        f"{_median(result.publish_s):.3f}",
        f"{_median(result.publish_s) / _median(result.raw_s):.2f}",
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
        f"{result.bytes / 2**20 / _median(result.publish_s):.0f}",
        str(result.different_tensors),
        f"{result.logprob_distance:.1e}",
    ]


def _table(results: Sequence[CaseResult]) -> str:
    header = [
        *("model", "engine TP", "MiB", "tensors", "buckets", "collectives", "broadcast, s", "publish, s", "ratio"),
        *("ratios of single pairs", "MiB/s", "tensors that differ", "log-prob distance"),
    ]
    return markdown_table(header, map(_row, results)) + "\n"


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time of a publication beside one broadcast of the same bytes.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), help="for publish.md")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--engine-workers", type=int, nargs="+", default=[2, 1], help="tensor parallel size of the engine"
    )
    parser.add_argument("--bucket-mib", type=float, default=32.0)
    parser.add_argument("--repetitions", type=int, default=7)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
