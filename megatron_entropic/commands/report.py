"""`megatron-entropic report`: an HTML page about runs, or about evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_entropic.errors import UserError
from megatron_entropic.files.text import printable


def add_parser(commands: Any) -> None:
    """Add `report` to the subparsers of the command line."""
    report = commands.add_parser("report", help="write an HTML page about one or several runs, or evaluations")
    report.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    report.add_argument("--output", type=Path, help="folder to write into (default: RUN_DIR/report of the first run)")
    report.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> None:
    from megatron_entropic.evaluation.page import write_evaluation_page
    from megatron_entropic.evaluation.store import is_evaluation
    from megatron_entropic.reports.report import write_report

    output_dir = options.output or options.run_dirs[0] / "report"
    evaluations = [is_evaluation(directory) for directory in options.run_dirs]
    if any(evaluations) and not all(evaluations):
        raise UserError("a report is about runs or about evaluations, not about both at once")
    write = write_evaluation_page if all(evaluations) else write_report
    page = write(options.run_dirs, output_dir)
    Console().print(printable(f"report: {page}"), markup=False, soft_wrap=True)
