"""`megatron-entropic replay`: one recorded step computed again, or a whole run as it was scheduled."""

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
    replay = commands.add_parser("replay", help="compute one recorded step again, or a whole run as it was scheduled")
    replay.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    what = replay.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--step", type=whole(1), metavar="N", help="a step whose rollouts were kept, in this process, without a cluster"
    )
    what.add_argument(
        "--schedule",
        action="store_true",
        help="train again, requests and weights reaching engines when they did: the same tokens of a run with lag",
    )
    replay.add_argument("--checkpoint", type=Path, metavar="DIR", help="--step: start from (default: that of N - 1)")
    replay.add_argument("--steps", type=whole(1), metavar="N", help="--schedule: end after N (default: as the run did)")
    replay.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="--schedule: the new run (default: RUN_DIR/replayed)"
    )
    replay.set_defaults(command=_replay)


def _replay(options: argparse.Namespace) -> None:
    if options.schedule:
        _replay_schedule(options)
        return
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


def _replay_schedule(options: argparse.Namespace) -> None:
    from megatron_entropic.cluster.environment import prepare_ray_environment
    from megatron_entropic.training.replayed_run import compare_runs, replayed_config

    output_dir = options.output_dir or options.run_dir / "replayed"
    config = replayed_config(options.run_dir, output_dir, options.steps)
    prepare_ray_environment(config.cluster)
    from megatron_entropic.training.trainer import train

    train(config)
    differences, steps, values = compare_runs(options.run_dir, output_dir)
    console = Console(width=160, highlight=False)
    for line in differences[:20]:
        console.print(Text(printable(line)))
    console.print(f"{steps} steps, {values:,} values of tokens, log-probs and metrics: {len(differences)} differ")
