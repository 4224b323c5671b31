"""`megatron-entropic train`: a training run, begun or continued."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_entropic.cluster.environment import prepare_ray_environment
from megatron_entropic.config.load import batch_arithmetic, config_warnings
from megatron_entropic.files.text import printable
from megatron_entropic.training.machine import load_checked_config


def add_parser(commands: Any) -> None:
    """Add `train` to the subparsers of the command line."""
    train = commands.add_parser("train", help="run or continue a training run")
    train.add_argument("config", type=Path, metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="e.g. train.steps=500")
    train.add_argument(
        "--check", action="store_true", help="open all a run would read (headers of weights), start nothing"
    )
    train.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> None:
    config = load_checked_config(options.config, options.overrides)
    console = Console()
    table = Table(title=f"{config.run.name}: what one step means", title_justify="left", show_header=False)
    for name, value in batch_arithmetic(config):
        table.add_row(escape(name), escape(printable(value)))
    console.print(table)
    for warning in config_warnings(config):
        console.print(f"[yellow]warning:[/] {escape(printable(warning))}", soft_wrap=True)
    if options.check:
        from megatron_entropic.training.preconditions import open_inputs

        with open_inputs(config) as inputs:
            console.print(printable("\n".join(inputs.tasks.report.lines())), markup=False, soft_wrap=True)
        return
    # Ray reads its settings when the trainer imports it.
    prepare_ray_environment(config.cluster)
    from megatron_entropic.training.trainer import train

    console.print(printable(f"done: {train(config)}"), markup=False, soft_wrap=True)
