"""The command line: one subparser a command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence as Args
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_entropic import __version__
from megatron_entropic.cluster.environment import prepare_ray_environment
from megatron_entropic.commands.convert import add_convert_parsers
from megatron_entropic.commands.evaluate import add_evaluate_parser
from megatron_entropic.commands.export import add_export_parser
from megatron_entropic.commands.options import number, whole
from megatron_entropic.commands.replay import add_replay_parser
from megatron_entropic.commands.rollouts import add_rollouts_parser
from megatron_entropic.commands.tune import add_tune_parser
from megatron_entropic.config.checks import violations
from megatron_entropic.config.load import ConfigError, batch_arithmetic, config_warnings, read_config
from megatron_entropic.config.run import Config, PolicyConfig
from megatron_entropic.errors import Interrupted, RunError, StopAsked, UserError, explained
from megatron_entropic.files.text import printable
from megatron_entropic.observability.progress import PhaseDisplay
from megatron_entropic.training.machine import load_checked_config

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command continues."""


def main(arguments: Args[str] | None = None) -> int:
    """Entry point of `megatron-entropic`.

    Returns:
        0, 1 (the work failed, or `verify` found a difference), 2 (bad input), 75 (asked to stop) or 130 (interrupted).
        What is none of `errors` is a bug of ours: it goes on as it is, and Python prints its traceback and ends with 1.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives up on overrides that come after an option.
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        return options.command(options) or 0
    except StopAsked as error:
        errors.print(f"[bold yellow]stopped:[/] {escape(printable(str(error)))}")
        return INTERRUPTED if isinstance(error, Interrupted) else STOPPED
    except (UserError, RunError, OSError) as error:
        told = explained(error) if isinstance(error, OSError) else error
        if told is None:
            raise
        errors.print(f"[bold red]error:[/] {escape(printable(str(told)))}")
        return BAD_INPUT if isinstance(told, UserError) else FAILED
    except MemoryError:
        errors.print("[bold red]error:[/] the machine, or a limit of memory (ulimit -v), has no more to give")
        return FAILED
    except KeyboardInterrupt:
        errors.print("[bold yellow]interrupted[/]: ended at once; train and evaluate continue from what they saved")
        return INTERRUPTED


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
            console.print(printable("\n".join(inputs.prompts.report.lines())), markup=False, soft_wrap=True)
        return
    # Ray reads its settings when the trainer imports it.
    prepare_ray_environment(config.cluster)
    from megatron_entropic.training.trainer import train

    console.print(printable(f"done: {train(config)}"), markup=False, soft_wrap=True)


def _preflight(options: argparse.Namespace) -> None:
    from megatron_entropic.cluster import preflight

    config, broken = read_config(options.config, options.overrides)
    if broken:
        raise ConfigError(str(options.config), broken)
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


def _score(options: argparse.Namespace) -> None:
    layout = PolicyConfig(
        tensor_parallel=options.tensor_parallel,
        pipeline_parallel=options.pipeline_parallel,
        data_parallel=options.data_parallel,
        context_parallel=options.context_parallel,
        expert_parallel=options.expert_parallel,
        sequence_parallel=options.sequence_parallel,
        tokens_per_microbatch=options.tokens_per_microbatch,
    )
    parallel = layout.world_size > 1 or layout.sequence_parallel or layout.expert_parallel > 1
    if options.backend != "megatron" and parallel:
        raise UserError(f"--backend {options.backend} runs in one process; parallel layouts need --backend megatron")
    with PhaseDisplay(Console(stderr=True)) as phases:
        phases.begin(f"scoring with {options.backend}")
        _score_with(options, layout)


def _score_with(options: argparse.Namespace, layout: PolicyConfig) -> None:
    files = {"hf_dir": options.hf_dir, "tokens_path": options.tokens, "output_path": options.output}
    if options.backend == "megatron":
        from megatron_entropic.policy.score_worker import score_file

        score_file(**files, policy=layout, temperature=options.temperature, dtype=options.dtype, device=options.device)
    elif options.backend == "vllm":
        from megatron_entropic.rollout.score_backend import score_file as score_with_vllm

        score_with_vllm(**files, dtype=options.dtype, temperature=options.temperature)
    else:
        from megatron_entropic.policy.score_transformers import score_file as score_with_transformers

        score_with_transformers(**files, temperature=options.temperature, dtype=options.dtype)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-entropic", description="Reinforcement learning on Megatron-core with controlled entropy."
    )
    parser.add_argument("--version", action="version", version=f"megatron-entropic {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run or continue a training run")
    train.add_argument("config", type=Path, metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="e.g. train.steps=500")
    train.add_argument(
        "--check", action="store_true", help="open all a run would read (headers of weights), start nothing"
    )
    train.set_defaults(command=_train)

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

    add_evaluate_parser(commands)

    score = commands.add_parser("score", help="log-probs and entropies of given tokens: does training equal rollout?")
    score.add_argument("--hf-dir", type=Path, required=True)
    score.add_argument("--tokens", type=Path, required=True, help='JSON lines {"tokens": [...], "prompt_length": n}')
    score.add_argument("--output", type=Path, required=True, help="JSON lines with logprobs and entropies (nats) added")
    score.add_argument("--backend", choices=["megatron", "vllm", "transformers"], default="megatron")
    for name in ("tensor", "pipeline", "data", "context", "expert"):
        score.add_argument(f"--{name}-parallel", type=whole(1), default=1, metavar="N")
    score.add_argument("--sequence-parallel", action="store_true")
    score.add_argument("--temperature", type=number(above=0), default=1.0)
    score.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    score.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    score.add_argument("--tokens-per-microbatch", type=whole(1), default=16384)
    score.set_defaults(command=_score)

    add_convert_parsers(commands)
    add_export_parser(commands)
    add_replay_parser(commands)

    add_rollouts_parser(commands)

    report = commands.add_parser("report", help="write an HTML page about one or several runs, or evaluations")
    report.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    report.add_argument("--output", type=Path, help="folder to write into (default: RUN_DIR/report of the first run)")
    report.set_defaults(command=_report)

    add_tune_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
