"""How many answers a second verifier processes judge: `python -m benchmarks.verifier_pool FILE --workers 1 2 4`.

FILE has problems with answers, the training problems of MATH for instance. Every answer is judged against the ground
truth of another row, so that it has to be parsed. Workers first judge 400 answers each that are not measured: the first
hundred take a new process about twice as long. What a worker had of a core is its CPU time over the wall time: below
one, the machine was busy with something else or the worker had to wait.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from megatron_entropic.config.run import RewardConfig
from megatron_entropic.data.prompts import read_truth
from megatron_entropic.data.rows import RowProblems, read_rows
from megatron_entropic.rewards.judge import Judge
from megatron_entropic.rewards.verifier import Job

_UNMEASURED = 400
_REASONING = "So we substitute, simplify and collect the terms of the left hand side, which gives the following. " * 24


def jobs_of(file: Path) -> list[Job]:
    """Responses of 2.4 kB, one for each usable row, with the answer of another row."""
    truths = []
    for row in read_rows([file], RowProblems()):
        with suppress(ValueError):
            truths.append(str(read_truth(row, None)))
    answers = truths[7:] + truths[:7]
    pairs = [(answer, truth) for answer, truth in zip(answers, truths, strict=True) if answer != truth]
    return [(rf"{_REASONING}\boxed{{{answer}}}", truth, {}) for answer, truth in pairs]


def cpu_s(process: psutil.Process) -> float:
    """CPU time that a process has had."""
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(jobs: list[Job], checks: int, workers: int) -> str:
    """One line: throughput of the last `checks` jobs, and where the CPU time went."""
    here = psutil.Process()
    judge = Judge(RewardConfig(workers=workers), "math")
    try:
        children = here.children()
        judge.verdicts(jobs[: _UNMEASURED * workers])
        before, driver = [cpu_s(child) for child in children], cpu_s(here)
        begin = time.monotonic()
        verdicts = judge.verdicts(jobs[-checks:])
        wall_s = time.monotonic() - begin
        used = [cpu_s(child) - earlier for child, earlier in zip(children, before, strict=True)]
        driver = cpu_s(here) - driver
    finally:
        judge.close()
    failed = sum(verdict.status != "ok" for verdict in verdicts)
    shares = " ".join(f"{seconds / wall_s:.2f}" for seconds in used)
    return (
        f"{workers} workers: {checks / wall_s:.0f} checks/s, CPU ms a check: worker "
        f"{1000 * sum(used) / checks:.2f}, driver {1000 * driver / checks:.3f}; cores of each worker {shares}; "
        f"{failed} failed"
    )


def main() -> None:
    """Measure every number of workers, several times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--checks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    jobs = jobs_of(arguments.file)
    for _ in range(arguments.rounds):
        for workers in arguments.workers:
            sys.stdout.write(measure(jobs, arguments.checks, workers) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
