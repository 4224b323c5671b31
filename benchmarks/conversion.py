"""Time and memory of checkpoint conversion against `cp -r` of the same bytes, over model sizes.

    python benchmarks/conversion.py [--work-dir DIR] [--output-dir DIR] [--layers N [N ...]]

Checkpoints have the shape of Qwen3-8B with fewer layers or all 36, random bfloat16 values. For each size, one after the
other: `cp -r` of the Hugging Face directory, conversion to torch_dist, `cp -r` of that, conversion back. Before each,
the pages of its source are dropped from the page cache. Conversions end with fsync of all files, `cp` does not; the
time of a following `sync` of its output is told apart. Memory is RssAnon of the converting process, sampled; workers
are its threads. Three times the checkpoint's size must be free on the disk of the working directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import markdown_table
from megatron_entropic.checkpoints.hf import write_hf_directory
from megatron_entropic.models.dimensions import read_dimensions
from megatron_entropic.models.parameter_map import ParameterMap
from megatron_entropic.planning.parameters import KNOWN_MODELS

TOOLS = Path(__file__).resolve().parents[1] / "tools/checkpoint_convert"
BLOCK_VALUES = 2**26
SAMPLE_EVERY_S = 0.02


@dataclass(frozen=True)
class Run:
    """One measured command."""

    seconds: float
    peak_anonymous_bytes: int


@dataclass(frozen=True)
class Row:
    """All of one size."""

    layers: int
    nbytes: int
    copy: Run
    sync_s: float
    to_megatron: Run
    copy_back: Run
    sync_back_s: float
    to_hf: Run


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    rows = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory(prefix="conversion-", dir=options.work_dir) as folder:
            row = _measure(Path(folder), layers)
        rows.append(row)
        console.print(_line(row), soft_wrap=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "conversion.md"
    path.write_text(_table(rows), encoding="utf-8")
    console.print(f"wrote {path}", soft_wrap=True)
    return 0


def _measure(folder: Path, layers: int) -> Row:
    hf_dir, megatron_dir, back, copied = (folder / name for name in ("hf", "megatron", "back", "copied"))
    nbytes = _write_checkpoint(hf_dir, folder, layers)
    copy, sync_s = _copy(hf_dir, copied)
    to_megatron = _run(hf_dir, _tool("hf_to_megatron", "--hf-dir", hf_dir, megatron_dir))
    copy_back, sync_back_s = _copy(megatron_dir, copied)
    to_hf = _run(megatron_dir, _tool("megatron_to_hf", "--megatron-dir", megatron_dir, back))
    for path in sorted(hf_dir.glob("*.safetensors")):
        subprocess.run(["cmp", path, back / path.name], check=True)
    return Row(layers, nbytes, copy, sync_s, to_megatron, copy_back, sync_back_s, to_hf)


def _write_checkpoint(hf_dir: Path, folder: Path, layers: int) -> int:
    """A checkpoint of Qwen3-8B's shape with some of its layers; returns its bytes."""
    template = folder / "template"
    template.mkdir()
    config = json.loads((KNOWN_MODELS / "Qwen3-8B.json").read_text(encoding="utf-8"))
    (template / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}), encoding="utf-8")
    shapes = ParameterMap(read_dimensions(template)).hf_tensors
    write_hf_directory(hf_dir, _random_tensors(shapes), template)
    return sum(prod(shape) for shape in shapes.values()) * torch.bfloat16.itemsize


def _random_tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Values from one random block, each tensor from another place in it."""
    generator = torch.Generator().manual_seed(3)
    block = torch.randn(BLOCK_VALUES, generator=generator).to(torch.bfloat16)
    for index, (name, shape) in enumerate(shapes.items()):
        size = prod(shape)
        repeated = block.roll(index * 7919).repeat(-(-size // BLOCK_VALUES))
        yield name, repeated[:size].view(shape)


def _tool(name: str, flag: str, source: Path, output: Path) -> list[str]:
    return [sys.executable, str(TOOLS / f"{name}.py"), flag, str(source), "--output-dir", str(output)]


def _copy(source: Path, target: Path) -> tuple[Run, float]:
    """`cp -r` and, apart, the seconds until the copy is on the disk; the copy is removed."""
    run = _run(source, ["cp", "-r", str(source), str(target)])
    started = time.perf_counter()
    for path in target.iterdir():
        _flush(path)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return run, seconds


def _run(source: Path, command: list[str]) -> Run:
    """Run a command whose source is not in the page cache."""
    for path in source.iterdir():
        _flush(path, forget=True)
    peak = 0
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(process.pid))
            time.sleep(SAMPLE_EVERY_S)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Run(seconds, peak)


def _flush(path: Path, *, forget: bool = False) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    if forget:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def _line(row: Row) -> str:
    return " ".join(f"{name} {cell}" for name, cell in zip(HEADER, _cells(row), strict=True))


HEADER = (
    "layers",
    "GB",
    "`cp -r`, s (+ sync)",
    "to torch_dist, s",
    "ratio",
    "ratio with sync",
    "`cp -r` of it, s (+ sync)",
    "back, s",
    "ratio",
    "ratio with sync",
    "peak RssAnon, MB: there, back",
)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        str(row.layers),
        f"{row.nbytes / 1e9:.1f}",
        f"{row.copy.seconds:.1f} (+ {row.sync_s:.1f})",
        f"{row.to_megatron.seconds:.1f}",
        f"{row.to_megatron.seconds / row.copy.seconds:.2f}",
        f"{row.to_megatron.seconds / (row.copy.seconds + row.sync_s):.2f}",
        f"{row.copy_back.seconds:.1f} (+ {row.sync_back_s:.1f})",
        f"{row.to_hf.seconds:.1f}",
        f"{row.to_hf.seconds / row.copy_back.seconds:.2f}",
        f"{row.to_hf.seconds / (row.copy_back.seconds + row.sync_back_s):.2f}",
        f"{row.to_megatron.peak_anonymous_bytes / 1e6:.0f}, {row.to_hf.peak_anonymous_bytes / 1e6:.0f}",
    )


def _table(rows: list[Row]) -> str:
    return markdown_table(HEADER, [_cells(row) for row in rows]) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 9, 18, 36], help="layers of each checkpoint")
    parser.add_argument("--work-dir", type=Path, help="where checkpoints are made and removed (default: system's)")
    parser.add_argument("--output-dir", type=Path, default=Path("."), help="where conversion.md is written")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
