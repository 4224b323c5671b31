"""`megatron-entropic replay`: one recorded step computed again on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_entropic.commands.options import whole
from megatron_entropic.files.text import printable
from megatron_entropic.observability.progress import PhaseDisplay


def add_parser(commands: Any) -> None:
    """Add `replay` to the subparsers of the command line."""
    replay = commands.add_parser("replay", help="compute one recorded step again in this process, without a cluster")
    replay.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    replay.add_argument("--step", type=whole(1), required=True, metavar="N", help="a step whose rollouts were kept")
    replay.add_argument("--checkpoint", type=Path, metavar="DIR", help="start from (default: that of step N - 1)")
    replay.set_defaults(command=_replay)


def _replay(options: argparse.Namespace) -> None:
    from megatron_entropic.training.replay import replay

    with PhaseDisplay(Console(stderr=True)) as phases:
        found = replay(options.run_dir, options.step, options.checkpoint, begin=phases.begin)
    table = Table(title=Text(printable(f"step {found.step}, from {found.state}")), title_justify="left")
    for column in ("metric", "recorded", "replayed", "difference"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    for name, (before, now) in found.metrics.items():
        table.add_row(Text(printable(name)), f"{before:.9g}", f"{now:.9g}", f"{now - before:.2e}")
    for name, largest in found.largest_difference.items():
        table.add_row(f"{name}, largest over tokens", "", "", f"{largest:.2e}")
    Console(width=160, highlight=False).print(table)
