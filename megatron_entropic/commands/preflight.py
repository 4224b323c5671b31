"""`megatron-entropic preflight`: every node of a job looked at before anything starts on it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_entropic.commands.options import number, whole
from megatron_entropic.config.load import load_config
from megatron_entropic.errors import UserError


def add_parser(commands: Any) -> None:
    """Add `preflight` to the subparsers of the command line."""
    look = commands.add_parser("preflight", help="look at every node of a job before it starts; one process on each")
    look.add_argument("config", type=Path, metavar="CONFIG.yaml")
    look.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="as for train")
    look.add_argument("--nodes", required=True, metavar="A,B,...", help="all nodes; the first collects the reports")
    look.add_argument("--node", default=os.environ.get("SLURMD_NODENAME"), help="this node (default: Slurm's name)")
    look.add_argument("--address", required=True, help="of the first node, as the others reach it")
    look.add_argument("--port", type=whole(0), required=True)
    look.add_argument("--token-file", default=os.environ.get("RAY_AUTH_TOKEN_PATH"), help="(default: Ray's)")
    look.add_argument("--gpus-per-node", default="0", metavar="N", help="as Slurm says it, such as 8 or h100:8")
    look.add_argument("--timeout-s", type=number(above=0), default=300.0)
    look.set_defaults(command=_preflight)


def _preflight(options: argparse.Namespace) -> None:
    from megatron_entropic.cluster import preflight

    config = load_config(options.config, options.overrides)
    if options.token_file is None:
        raise UserError("pre-flight: no secret to mark the reports with: give --token-file, or set RAY_AUTH_TOKEN_PATH")
    place = preflight.MeetingPlace(options.address, options.port, options.timeout_s, Path(options.token_file))
    try:
        gpus_per_node = preflight.gpu_count(options.gpus_per_node)
    except ValueError as error:
        raise UserError(f"--gpus-per-node={options.gpus_per_node}: expected such as 8 or h100:8") from error
    required = preflight.requirements(config, options.nodes.split(","), gpus_per_node)
    if options.node != required.nodes[0]:
        preflight.report_to(place, options.node, required.paths)
        return
    reports = preflight.collect_reports(place, required)
    Console(width=160).print(preflight.table(reports))
    if found := preflight.problems(reports, required):
        raise UserError("pre-flight:\n  " + "\n  ".join(found))
