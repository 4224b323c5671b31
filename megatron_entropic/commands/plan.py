"""`megatron-entropic plan`: what a configuration will need, by arithmetic."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_entropic.commands.options import number, whole
from megatron_entropic.config.checks import violations
from megatron_entropic.config.load import ConfigError, read_config
from megatron_entropic.config.run import Config


def add_parser(commands: Any) -> None:
    """Add `plan` to the subparsers of the command line."""
    plan = commands.add_parser("plan", help="parameters, memory, traffic and time of a configuration, by arithmetic")
    plan.add_argument("config", type=Path, metavar="CONFIG.yaml")
    plan.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="e.g. policy.tensor_parallel=4")
    plan.add_argument("--gpus", type=whole(1), metavar="N", help="GPUs there are (default: as many as configured)")
    plan.add_argument(
        "--gpu-memory-gb", type=number(above=0), default=80.0, metavar="G", help="of each GPU (default: 80)"
    )
    plan.add_argument("--model-config", type=Path, metavar="FILE.json", help="a config.json in place of model.hf_dir's")
    plan.add_argument("--suggest", action="store_true", help="search layouts for these GPUs and print the fastest")
    plan.add_argument("--buckets", action="store_true", help="list every bucket in which weights reach the engines")
    plan.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> None:
    from megatron_entropic.planning.parameters import ParameterTable, find_model
    from megatron_entropic.planning.plan import BUCKET_BYTES, make_plan
    from megatron_entropic.planning.report import sections, show, suggestion_section
    from megatron_entropic.planning.suggest import Suggestion, suggest

    def accepts(config: Config) -> bool:
        return not any(violations(config))

    # What this machine has says nothing about the one that is planned for.
    config, problems = read_config(options.config, options.overrides)
    table = ParameterTable(find_model(config.model.hf_dir, options.model_config))
    memory_gb = options.gpu_memory_gb
    plan = make_plan(config, table, gpus=options.gpus, gpu_memory_gb=memory_gb, known_problems=problems)
    parts = list(sections(plan))
    found: list[Suggestion] = []
    if options.suggest:
        found = suggest(config, table, gpus=plan.gpus, gpu_memory_gb=memory_gb, accepts=accepts)
        parts.append(suggestion_section(found, plan.gpus))
    show(parts, Console())
    if plan.problems:
        refused = ConfigError(str(options.config), list(plan.problems))
        unreadable = set(problems) - {violation.message for violation in violations(config)}
        if not found or unreadable:
            raise refused
        # A suggestion is an answer: what keeps the configuration from running as it is written is not a failure then.
        Console(stderr=True).print(f"as it is written, {refused}", markup=False, highlight=False, soft_wrap=True)
    if options.buckets:
        buckets = table.publish_plan(config.policy, config.model.dtype, BUCKET_BYTES)
        Console().print(f"\n{buckets.describe()}", markup=False, highlight=False, soft_wrap=True)
