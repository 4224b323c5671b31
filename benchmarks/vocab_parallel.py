"""Log-probability and entropy over a sharded vocabulary, side by side with what other trainers run, on this CPU.

    python benchmarks/vocab_parallel.py [--output-dir DIR] [--repetitions N] [--quick]

Writes Markdown tables, the same figures as JSON, and a PNG of memory against tokens. Every process has one thread.
Repetitions are interleaved (A B C A B C ...), so that a load on the machine that comes and goes hits all alike. The
main figure is CPU time: unlike wall time it does not count the time that other processes had the core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import absences, head_contenders, logits_contenders
from benchmarks.machine import available_bytes
from benchmarks.problems import Case
from benchmarks.ranks import run_on_ranks
from benchmarks.tables import write_report
from benchmarks.trials import Trial, run_case

CPU = torch.device("cpu")
MEMORY_MULTIPLE = 6
"""Shards of logits that the textbook path may need beside them, twice over for a machine in use."""


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    cases = _quick_cases() if options.quick else _cases(options.repetitions)
    notes, fitting = absences(CPU), []
    for case in cases:
        needed = MEMORY_MULTIPLE * case.ranks * case.shard_bytes
        if needed > available_bytes():
            notes.append(f"{case.describe()}: needs {needed / 2**30:.0f} GiB, more than this machine has free")
        else:
            fitting.append(case)
    trials: list[Trial] = []
    for ranks, pages_kept in sorted({(case.ranks, case.pages_kept) for case in fitting}):
        own = [case for case in fitting if (case.ranks, case.pages_kept) == (ranks, pages_kept)]
        for found in run_on_ranks(_on_rank, ranks, own, timeout_s=options.timeout, pages_kept=pages_kept):
            trials += found
            console.print(f"measured {found[0].case.describe()}", soft_wrap=True)
    for path in write_report(trials, notes, options.output_dir):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


def _on_rank(group: dist.ProcessGroup, cases: list[Case]) -> Iterator[list[Trial]]:
    for case in cases:
        contenders = logits_contenders(case, CPU) if case.hidden is None else head_contenders(CPU)
        yield run_case(case, contenders, group, CPU)


def _cases(repetitions: int) -> list[Case]:
    """The tables of docs/performance.md."""
    shapes = [
        Case(tokens=2048, vocab=32000, repetitions=repetitions),
        Case(tokens=2048, vocab=32000, dtype="bfloat16", repetitions=repetitions),
        Case(tokens=1024, vocab=151936, repetitions=repetitions),
    ]
    sharded = [replace(case, ranks=2) for case in shapes]
    given = [
        *(replace(case, errors=False) for case in shapes),
        *sharded,
        *(replace(case, entropy_gradient=False, errors=False) for case in sharded),
        *(replace(case, pages_kept=True, errors=False) for case in sharded),
        replace(sharded[-1], offset=1000.0, repetitions=0),
    ]
    few = max(1, repetitions // 2)
    head = Case(tokens=1024, vocab=32000, hidden=512, repetitions=few)
    timed = [
        head,
        replace(head, tokens=4096, errors=False),
        replace(head, ranks=2),
        replace(head, tokens=4096, ranks=2),
    ]
    sizes = [replace(head, tokens=tokens, repetitions=0, errors=False) for tokens in (2048, 8192, 16384)]
    return [*given, *timed, *sizes]


def _quick_cases() -> list[Case]:
    """The same code in seconds; its times say nothing."""
    logits = Case(tokens=64, vocab=4096, repetitions=1)
    head = Case(tokens=64, vocab=4096, hidden=32, repetitions=1)
    larger = replace(head, tokens=256, repetitions=0)
    single = [logits, replace(logits, dtype="bfloat16"), head, larger]
    sharded = [logits, replace(logits, entropy_gradient=False), replace(logits, offset=1000.0, repetitions=0), head]
    return [*single, *(replace(case, ranks=2) for case in sharded)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure log-probability and entropy over a sharded vocabulary.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"), metavar="DIR")
    parser.add_argument("--repetitions", type=int, default=9, metavar="N", help="timed ones of each contender")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="for each number of ranks")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it work? The times say nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
