"""Log-probability and entropy on one GPU, as fractions of what the GPU can do at all.

    python benchmarks/gpu/vocab_parallel_gpu.py [--output-dir DIR] [--repetitions N]

First the rates: copying memory, and multiplying bfloat16 matrices. Then the operation on given logits, whose floor is
memory (forward one read, backward one read and one write), and the output layer included, whose floor is products. Made
to take less than five minutes on an H100; writes a Markdown table.

--device cpu runs the same code with tiny sizes: a check of the script, not of anything else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.contenders import (
    FUSED_GRADIENT,
    HEAD_OURS,
    OURS,
    TEXTBOOK,
    absences,
    head_contenders,
    logits_contenders,
)
from benchmarks.gpu.rates import WARM_UP, copy_rate, product_rate
from benchmarks.machine import cpu_model
from benchmarks.problems import Case
from benchmarks.ranks import tensor_parallel_group
from benchmarks.tables import LOGITS_COLUMNS, Ratios, environment, table
from benchmarks.trials import Trial, run_case


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    copy_bytes: int
    product: int
    """Rows and columns of the square matrices."""
    tokens: tuple[int, ...]
    vocab: int
    hidden: int


FULL = Sizes(copy_bytes=4 << 30, product=8192, tokens=(4096, 8192), vocab=151936, hidden=4096)
TINY = Sizes(copy_bytes=1 << 20, product=128, tokens=(64,), vocab=1024, hidden=32)


@dataclass(frozen=True)
class Rates:
    """What the device reaches at best."""

    bytes_per_s: float
    """Read plus written, of a copy within its memory."""
    flops_per_s: float
    """Of a product of bfloat16 matrices."""


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        Console(stderr=True).print(
            "[bold red]error:[/] this benchmark needs a GPU and torch finds none", soft_wrap=True
        )
        return 2
    device, sizes = torch.device(options.device), FULL if options.device == "cuda" else TINY
    console = Console(highlight=False)
    rates = Rates(
        copy_rate(sizes.copy_bytes, device, options.repetitions),
        product_rate(sizes.product, device, options.repetitions),
    )
    console.print(f"copy {rates.bytes_per_s / 1e12:.2f} TB/s, bf16 product {rates.flops_per_s / 1e12:.0f} TFLOP/s")
    backend = "nccl" if device.type == "cuda" else "gloo"
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder, tensor_parallel_group(0, 1, Path(folder), backend) as group:
        for case in _cases(sizes, options.repetitions):
            trials += _run(case, group, device)
            console.print(f"measured {case.describe()}", soft_wrap=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "vocab_parallel_gpu.md"
    path.write_text(_report(trials, rates, device), encoding="utf-8")
    console.print(f"wrote {path}", soft_wrap=True)
    return 0


def _run(case: Case, group: dist.ProcessGroup, device: torch.device) -> list[Trial]:
    """Once to compile kernels and fill caches, then measured."""
    contenders = logits_contenders(case, device) if case.hidden is None else head_contenders(device)
    run_case(replace(case, repetitions=WARM_UP), contenders, group, device)
    return run_case(case, contenders, group, device)


def _cases(sizes: Sizes, repetitions: int) -> list[Case]:
    dtypes = ("bfloat16", "float32")
    shapes = [Case(tokens, sizes.vocab, dtype, errors=False) for tokens in sizes.tokens for dtype in dtypes]
    given = [replace(case, repetitions=repetitions) for case in shapes]
    heads = [Case(tokens, sizes.vocab, "bfloat16", hidden=sizes.hidden, errors=False) for tokens in sizes.tokens]
    return [*given, *(replace(case, repetitions=max(1, repetitions // 2)) for case in heads)]


def _report(trials: list[Trial], rates: Rates, device: torch.device) -> str:
    given = [trial for trial in trials if trial.case.hidden is None]
    heads = [trial for trial in trials if trial.case.hidden is not None]
    faster, slower = Ratios(given, TEXTBOOK), Ratios(heads, HEAD_OURS)
    plain = {trial.case: trial for trial in heads if trial.contender == HEAD_OURS}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    operation = _fastest_operation(given)
    parts = [
        "# Log-probability and entropy on one GPU",
        f"{name}; {environment()}.",
        f"Copy within memory {rates.bytes_per_s / 1e12:.2f} TB/s read plus written; product of bf16 matrices "
        f"{rates.flops_per_s / 1e12:.0f} TFLOP/s.",
        "## Given logits",
        "Floor: the logits are read once forward, read and written once backward, at the rate of the copy. 100 % is "
        "that floor.",
        table(
            given,
            [
                *LOGITS_COLUMNS,
                ("forward, ms", lambda trial: _milliseconds(_forward(trial))),
                ("both, ms", lambda trial: _milliseconds(_total(trial))),
                ("forward, of copy rate", lambda trial: _percent(_floor(trial, 1, rates) / _forward(trial))),
                ("both, of copy rate", lambda trial: _percent(_floor(trial, 3, rates) / _total(trial))),
                ("x textbook", lambda trial: faster("total", "wall", trial)),
                ("memory, shards", lambda trial: f"{trial.shards:.3f}"),
            ],
        ),
        "## Output layer included",
        "Floors: 8 T H V operations with recomputation and 6 T H V without, at the rate of the product; and for the "
        f'gradient in forward ("{FUSED_GRADIENT}") three products plus the operation as measured above.',
        table(
            heads,
            [
                *LOGITS_COLUMNS,
                ("both, ms", lambda trial: _milliseconds(_total(trial))),
                ("x 8THV", lambda trial: f"{_total(trial) / _products(trial, 8, rates):.2f}"),
                ("x 6THV", lambda trial: f"{_total(trial) / _products(trial, 6, rates):.2f}"),
                (
                    "x (6THV + operation)",
                    lambda trial: f"{_total(trial) / (_products(trial, 6, rates) + operation[trial.case.tokens]):.2f}",
                ),
                (f"x {HEAD_OURS}", lambda trial: slower.inverse("total", "wall", trial)),
                ("memory, GiB", lambda trial: f"{trial.peak_bytes / 2**30:.2f}"),
                (f"{HEAD_OURS} / this", lambda trial: f"{plain[trial.case].peak_bytes / trial.peak_bytes:.1f}"),
            ],
        ),
    ]
    return "\n\n".join([*parts, *(f"Not measured: {reason}." for reason in absences(device))]) + "\n"


def _fastest_operation(given: list[Trial]) -> dict[int, float]:
    """Seconds forward and backward of this project's fastest backend on bfloat16 logits, by tokens."""
    own = [trial for trial in given if trial.contender.startswith(OURS) and trial.case.dtype == "bfloat16"]
    return {trial.case.tokens: _total(trial) for trial in sorted(own, key=_total, reverse=True)}


def _forward(trial: Trial) -> float:
    assert trial.forward is not None
    return trial.forward.wall


def _total(trial: Trial) -> float:
    assert trial.total is not None
    return trial.total.wall


def _floor(trial: Trial, passes: int, rates: Rates) -> float:
    """Seconds that so many passes over the logits take at the rate of a copy."""
    return passes * trial.case.shard_bytes / rates.bytes_per_s


def _products(trial: Trial, factor: int, rates: Rates) -> float:
    """Seconds that factor x T H V floating point operations take."""
    assert trial.case.hidden is not None
    return factor * trial.case.tokens * trial.case.hidden * trial.case.vocab / rates.flops_per_s


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure log-probability and entropy on one GPU.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), metavar="DIR")
    parser.add_argument("--repetitions", type=int, default=20, metavar="N", help="timed ones of each contender")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny sizes, to try the script")
    return parser


if __name__ == "__main__":
    sys.exit(main())
