"""What the commands of the studies share: options, the pool that does the runs, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from pool import Interrupted, Pool
from ray_node import ray_node
from rows import Results

INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM."""


class Experiment(Protocol):
    """Many runs with one result."""

    def run(self) -> dict[str, str]:
        """Do what is missing; returns the reasons of failures by name."""

    def results(self) -> Results:
        """The rows of the runs that are finished."""

    def report(self, results: Results) -> Path:
        """Write results and report; returns the page."""


def add_pool_options(parser: argparse.ArgumentParser) -> None:
    """--processes, --run-timeout-s, --report-only."""
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, about one core each (default: 2)")
    parser.add_argument("--run-timeout-s", type=float, default=3600.0, help="limit of one run (default: 3600)")
    parser.add_argument("--report-only", action="store_true", help="run nothing, report what is finished")


def conduct(options: argparse.Namespace, experiment_in: Callable[[Pool], Experiment]) -> int:
    """Do the runs unless only the report is asked for, and report.

    Args:
        options: with those of `add_pool_options`.
        experiment_in: makes the experiment, given the pool that does its runs.

    Returns:
        The exit status: 0 if everything is there, 1 if something failed, 130 if it was interrupted.
    """
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        node = None if options.report_only else stack.enter_context(ray_node(options.processes))
        pool = stack.enter_context(Pool(options.processes, options.run_timeout_s, say, node))
        experiment = experiment_in(pool)
        try:
            if not options.report_only:
                failures = experiment.run()
        except Interrupted as error:
            say(str(error))
            return INTERRUPTED
        results = experiment.results()
    say(f"report: {experiment.report(results)}" if results else "no run is finished yet")
    for name, reason in failures.items():
        say(f"failed: {name}: {reason}")
    return 1 if failures or not results else 0


def say(line: str) -> None:
    """Show a line at once, also where output is a file."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
