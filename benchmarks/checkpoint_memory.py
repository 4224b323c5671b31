"""Host memory and stopped training of a checkpoint of each format, and what comes back of it.

    python benchmarks/checkpoint_memory.py [--output-dir DIR] [--ranks N] [--tensor-parallel N]

A policy of 117 million parameters in bfloat16, replicated over the ranks, saves two checkpoints of each format; the
second is measured, on the rank where it costs most. Memory counts from before the first: copies are kept. The rank's
shard is what a checkpoint needs of it: its part of the optimizer state, and on the first replica the weights. Then
every rank reads the checkpoint back, in the same layout.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import markdown_table
from benchmarks.policies import ModelSize, policy, write_model
from benchmarks.ranks import run_processes
from megatron_entropic.policy.local_ranks import held_port

SIZE = ModelSize(layers=8, hidden=768, ffn=2880, heads=12, vocab=32000)
FORMATS = ("dp_reshardable", "fully_reshardable")
HEADER = [
    "format",
    "shard, MB",
    "host memory, MB",
    "of the shard",
    "training stopped, s",
    "until complete, s",
    "read, s",
]


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        hf_dir = Path(folder) / "model"
        write_model(SIZE, hf_dir)
        ports = tuple(held.enter_context(held_port()) for _ in FORMATS)
        place = (hf_dir, Path(folder), ports, options.tensor_parallel)
        for row in run_processes(_on_rank, options.ranks, *place, timeout_s=options.timeout):
            rows.append(row)
            console.print("  ".join(row))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "checkpoint_memory.md"
    path.write_text(markdown_table(HEADER, rows) + "\n", encoding="utf-8")
    console.print(f"wrote {path}", soft_wrap=True)
    return 0


def _on_rank(
    rank: int, ranks: int, hf_dir: Path, folder: Path, ports: tuple[int, ...], tensor_parallel: int
) -> Iterator[list[str]]:
    for format_name, port in zip(FORMATS, ports, strict=True):
        sections: dict[str, Any] = {
            "model": {"dtype": "bfloat16"},
            "policy": {"tensor_parallel": tensor_parallel, "data_parallel": ranks // tensor_parallel},
            "checkpoint": {"format": format_name},
        }
        with policy(rank, ranks, port, hf_dir, **sections) as one:
            root = folder / format_name
            before = _resident_bytes()
            one.save_checkpoint(root / "step_00000000", {"step": 0})
            one.check_checkpoint(wait=True)
            highest, stopped, complete = _second_save(one, root / "step_00000001")
            peak = highest - before
            began = time.perf_counter()
            one.load_checkpoint(root / "step_00000001")
            read = time.perf_counter() - began
            shard = _shard_bytes(one)
            figures = _where_it_costs_most([shard / 1e6, peak / 1e6, peak / shard, stopped, complete, read])
        yield [
            format_name,
            *(f"{value:,.{digits}f}" for value, digits in zip(figures, (0, 0, 2, 2, 1, 1), strict=True)),
        ]


def _resident_bytes() -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _second_save(one: Any, directory: Path) -> tuple[float, float, float]:
    """(most bytes that this process had, seconds until training goes on, seconds until it is complete)."""
    _resident_bytes()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the highest memory use so far
    began = time.perf_counter()
    one.save_checkpoint(directory, {"step": 1})
    stopped = time.perf_counter() - began
    one.check_checkpoint(wait=True)
    return _status("VmHWM"), stopped, time.perf_counter() - began


def _where_it_costs_most(figures: list[float]) -> list[float]:
    """The shard of the rank with the highest memory use for its shard; the longest times."""
    everyone = [torch.empty(len(figures), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, torch.tensor(figures, dtype=torch.float64))
    worst = max(everyone, key=lambda own: float(own[2]))
    return worst[:3].tolist() + torch.stack(everyone)[:, 3:].amax(0).tolist()


def _shard_bytes(one: Any) -> int:
    parameters = one.model.parameters() if one.parallel.data_rank == 0 else ()
    return sum(tensor.nbytes for tensor in (*one.optimizer.state_tensors(), *parameters))


def _status(name: str) -> float:
    """Bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith(f"{name}:"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Host memory and stopped training of a checkpoint, by format.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), help="for checkpoint_memory.md")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for the whole")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
