"""`megatron-entropic plan`: what a configuration will need, by arithmetic."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megatron_entropic.commands.options import number, whole
from megatron_entropic.config.checks import violations
from megatron_entropic.config.load import ConfigError, read_config
from megatron_entropic.config.run import Config

if TYPE_CHECKING:
    from megatron_entropic.planning.schedule import Lengths


def add_parser(commands: Any) -> None:
    """Add `plan` to the subparsers of the command line."""
    plan = commands.add_parser("plan", help="parameters, memory, traffic and time of a configuration, by arithmetic")
    plan.add_argument("config", type=Path, metavar="CONFIG.yaml")
    plan.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="e.g. policy.tensor_parallel=4")
    plan.add_argument("--gpus", type=whole(1), metavar="N", help="GPUs there are (default: as many as configured)")
    plan.add_argument("--gpu", metavar="KIND", help="A100, H100, H200, H20 or B200 (default: H100)")
    plan.add_argument(
        "--gpu-memory-gb", type=number(above=0), metavar="G", help="of each GPU (default: that of its kind)"
    )
    plan.add_argument(
        "--lengths",
        type=_lengths,
        metavar="WHICH",
        help="mean and standard deviation of the responses in tokens, as MEAN or MEAN,DEVIATION; or a step's rollouts, "
        "RUN/rollouts/step_NNNNNN.parquet, for the lengths of its prompts and responses",
    )
    plan.add_argument(
        "--lag", type=whole(0), nargs="+", default=[], metavar="L", help="also simulate the step at these rollout.lag"
    )
    plan.add_argument("--model-config", type=Path, metavar="FILE.json", help="a config.json in place of model.hf_dir's")
    plan.add_argument("--suggest", action="store_true", help="search layouts for these GPUs and print the fastest")
    plan.add_argument("--buckets", action="store_true", help="list every bucket in which weights reach the engines")
    plan.set_defaults(command=_plan)


def _lengths(text: str) -> Callable[[Lengths], Lengths]:
    """What --lengths says: from the lengths that are assumed to those that are meant."""
    from megatron_entropic.planning.schedule import Lengths

    if text.endswith(".parquet"):
        return lambda _: _recorded_lengths(Path(text))
    mean, _, deviation = text.partition(",")
    read = number(above=0)
    response = read(mean)
    spread = number(least=0)(deviation) if deviation else None
    return lambda assumed: Lengths(assumed.prompt_mean, response, spread)


def _recorded_lengths(path: Path) -> Lengths:
    """Lengths of a recorded step's prompts and responses."""
    from megatron_entropic.observability.records import recorded_lengths
    from megatron_entropic.planning.schedule import Lengths

    prompts, responses = recorded_lengths(path)
    return Lengths(fmean(prompts), fmean(responses), pstdev(responses))


def _plan(options: argparse.Namespace) -> None:
    from megatron_entropic.planning.hardware import machine
    from megatron_entropic.planning.parameters import ParameterTable, find_model
    from megatron_entropic.planning.plan import BUCKET_BYTES, make_plan
    from megatron_entropic.planning.report import sections, show, suggestion_section
    from megatron_entropic.planning.schedule import assumed_lengths
    from megatron_entropic.planning.suggest import Suggestion, suggest

    def objections(config: Config) -> list[str]:
        return [violation.message for violation in violations(config)]

    # What this machine has says nothing about the one that is planned for.
    config, problems = read_config(options.config, options.overrides)
    frozen = {name: path for name, path in config.algorithm.frozen_dirs.items() if path is not None}
    beside = {name: ParameterTable(find_model(path)) for name, path in frozen.items()}
    table = ParameterTable(find_model(config.model.hf_dir, options.model_config), beside=beside)
    asked = machine(options.gpu, options.gpu_memory_gb, options.gpus)
    lengths = None if options.lengths is None else options.lengths(assumed_lengths(config))
    plan = make_plan(config, table, asked, lengths=lengths, known_problems=problems)
    parts = list(sections(plan, options.lag))
    found: list[Suggestion] = []
    if options.suggest:
        found, reasons = suggest(config, table, asked, lengths=lengths, objections=objections)
        parts.append(suggestion_section(found, plan.gpus, reasons))
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
