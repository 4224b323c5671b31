"""Every method trains the countdown example for a few steps on two tensor ranks, through `megatron-entropic train`.

    python examples/study/methods.py                      all of methods.yaml; repeat the call to continue
    python examples/study/methods.py --output runs/methods --processes 1

A method is a set of overrides of examples/countdown_cpu.yaml and nothing else. All start from one model, which the
first call makes. This shows that each of them runs, and in which direction it moves entropy; it compares nothing: the
settings are not tuned, there is one seed, and the steps are few.

    OUTPUT/methods.md    one row for each method
    OUTPUT/runs/         a run directory for each method
    OUTPUT/logs/         what each process printed
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean

import yaml
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "countdown"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from command import INTERRUPTED, say
from grid import Overrides, arguments, digest
from pool import Failure, Interrupted, Pool, Work
from prepare import prepare
from ray_node import ray_node
from run import FINISHED, HERE

from megatron_entropic.config.base import Section
from megatron_entropic.config.load import read_config
from megatron_entropic.reports.run import Run, load_run

CONFIG = HERE.parent / "countdown_cpu.yaml"
LAST_STEPS = 5
"""Steps whose mean stands for the end of a run."""
TABLE = "methods.md"


class Methods(Section):
    """What is run."""

    steps: int = Field(ge=1, description="Rollouts of each run.")
    common: Overrides = Field(default_factory=dict)
    methods: dict[str, Overrides] = Field(min_length=1)

    def overrides(self, name: str) -> Overrides:
        """What a method has otherwise than the example."""
        start = {"run.name": name, "warm_start.steps": 0, "train.steps": self.steps}
        return start | self.common | self.methods[name]

    def problems(self) -> list[str]:
        """What is wrong with the configuration of any method."""
        return [
            f"{name}: {problem}"
            for name in self.methods
            for problem in read_config(CONFIG, arguments(self.overrides(name)))[1]
        ]


def run_all(methods: Methods, output: Path, pool: Pool) -> dict[str, str]:
    """Train every method that is not finished yet; returns the reasons of failures by name."""
    prepare(output / "data")
    model = output / "warm" / "hf"
    if not model.is_dir():
        warm_start = {"run.name": "warm start", "run.output_dir": output / "warm", "train.steps": 0}
        work = Work("warm start", partial(pool.train, CONFIG, _arguments(output, warm_start), output / "logs/warm.log"))
        if failures := pool.do_all([work]):
            return failures

    def train(name: str, directory: Path) -> None:
        overrides = methods.overrides(name) | {"run.output_dir": directory, "model.hf_dir": model}
        pool.train(CONFIG, _arguments(output, overrides), output / "logs" / f"{directory.name}.log")
        if not (directory / "metrics.jsonl").is_file():
            raise Failure(f"{directory}: the run ended without metrics.jsonl")
        (directory / FINISHED).touch()

    places = {name: directory_of(methods, name, output) for name in methods.methods}
    return pool.do_all(
        Work(name, partial(train, name, place)) for name, place in places.items() if not (place / FINISHED).exists()
    )


def directory_of(methods: Methods, name: str, output: Path) -> Path:
    """Where the run of a method is kept: another place as soon as its settings are others."""
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return output / "runs" / f"{readable}-{digest(methods.overrides(name))}"


def _arguments(output: Path, overrides: Overrides) -> list[str]:
    files = {
        "model.hf_dir": output / "data/model",
        "data.train_files": output / "data/train.parquet",
        "warm_start.file": output / "data/warm_start.parquet",
        "logging.wandb": "off",
        "checkpoint.asynchronous": False,
    }
    return arguments(files | overrides)


def table(methods: Methods, output: Path) -> Iterator[str]:
    """The lines of a Markdown table of the finished runs."""
    yield "| method | optimizer steps | H at first, nats | H at last | reward at first | at last | alpha at last |"
    yield "|---|---|---|---|---|---|---|"
    for name in methods.methods:
        directory = directory_of(methods, name, output)
        if not (directory / FINISHED).exists():
            yield f"| {name} | not finished | | | | | |"
            continue
        run = load_run(directory)
        updates = run.setting("algorithm.optimizer_steps_per_rollout") * run.setting("algorithm.epochs_per_rollout")
        entropy, reward, alpha = (run.finite(key) for key in ("entropy/mean", "reward/mean", "entropy/alpha"))
        taken = len(run.rows) * updates - int(sum(run.finite("optimizer/skipped")))
        acts = run.setting("entropy_control.controller") in ("p", "pi", "constant")
        cells = [name, str(taken), *_first_and_last(entropy), *_first_and_last(reward)]
        yield f"| {' | '.join([*cells, f'{fmean(alpha[-LAST_STEPS:]):+.2f}' if acts else '-'])} |"


def broken(run: Run, steps: int) -> list[str]:
    """What a run has that no run of any method should have."""
    found = [] if len(run.rows) == steps else [f"{len(run.rows)} of {steps} steps"]
    for key in ("entropy/mean", "grad_norm", "loss/policy"):
        if not all(math.isfinite(value) for value in run.series(key)):
            found.append(f"{key} is not finite at every step")
    if not any(run.finite("grad_norm")):
        found.append("no step had a gradient")
    return found


def _first_and_last(series: list[float]) -> list[str]:
    return [f"{fmean(series[:LAST_STEPS]):.3f}", f"{fmean(series[-LAST_STEPS:]):.3f}"]


def main() -> int:
    """Command line: 0 if every method trained, 1 if one did not, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(description="Train every method for a few steps; repeat the call to continue.")
    parser.add_argument("methods", nargs="?", type=Path, default=HERE / "methods.yaml", metavar="METHODS.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, two cores each (default: 1)")
    parser.add_argument("--run-timeout-s", type=float, default=1800.0, help="limit of one run (default: 1800)")
    options = parser.parse_args()
    methods = Methods.model_validate(yaml.safe_load(options.methods.read_text(encoding="utf-8")))
    if problems := methods.problems():
        parser.error("\n" + "\n".join(f"  - {problem}" for problem in problems))
    output = options.output.absolute()
    with ExitStack() as stack:
        node = stack.enter_context(ray_node(options.processes))
        pool = stack.enter_context(Pool(options.processes, options.run_timeout_s, say, node))
        try:
            failures = run_all(methods, output, pool)
        except Interrupted as error:
            say(str(error))
            return INTERRUPTED
    (output / TABLE).write_text("\n".join(table(methods, output)) + "\n", encoding="utf-8")
    finished = {name: directory_of(methods, name, output) for name in methods.methods}
    for name, directory in finished.items():
        if (directory / FINISHED).exists() and (found := broken(load_run(directory), methods.steps)):
            failures[name] = "; ".join(found)
    for name, reason in failures.items():
        say(f"failed: {name}: {reason}")
    say(f"table: {output / TABLE}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
