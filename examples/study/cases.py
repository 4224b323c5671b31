"""The cases of the studies of control, as data: runs that disturb themselves, and runs that go on from others.

    task     generated data and a model, supervised steps that all its runs start from, and what its regimes mean
    case     one or several legs in one run directory: calls of `megatron-entropic train`, each to a later last step and
             with overrides of its own, on top of those of the legs before. So targets, rates and rewards change in the
             middle of a run
    after    a case that goes on from the end of another, with its checkpoint and its settings
    tune     a leg with the gains that `megatron-entropic tune` proposes from the legs before

A case is run once for each of its regimes and seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from grid import Overrides, arguments, digest
from pydantic import Field, model_validator

from megatron_entropic.config.base import Section
from megatron_entropic.config.load import read_config

ROOT = Path(__file__).resolve().parents[2]
Table = Literal["targets", "offset", "disturbances", "tuning", "sensitivity", "regret"]


class Phase(Section):
    """Supervised steps on one file."""

    file: str = Field(description="Of the task's data, without .parquet.")
    overrides: Overrides = Field(description="Keys of the section warm_start.")


class Task(Section):
    """What is trained."""

    generate: Literal["countdown", "chain", "arithmetic"]
    config: str = Field(description="Base configuration of its runs, from the checkout's folder.")
    model: dict[str, int] = Field(default_factory=dict, description="Sizes that differ from the task's own model.")
    model_dir: str | None = Field(
        None, description="A model that runs start from as it is, from the checkout's folder."
    )
    warm_start: list[Phase] = Field(default_factory=list)
    benchmarks: dict[str, str] = Field(default_factory=dict, description="Name: file of the data, without .parquet.")
    common: Overrides = Field(default_factory=dict)
    regimes: dict[str, Overrides] = Field(default_factory=dict)


class Tune(Section):
    """Target and gains from what the run did so far."""

    settling_steps: float = Field(gt=0, description="Rollout steps.")
    last: int = Field(gt=0, description="Rollout steps to look at.")
    target_factor: float = Field(gt=0, description="Target as a multiple of the entropy at the end of the leg before.")


class Leg(Section):
    """A part of a run."""

    steps: int = Field(ge=1, description="Rollout steps more.")
    train_file: str = Field("train", description="Of the task's data, without .parquet.")
    overrides: Overrides = Field(default_factory=dict)
    tune: Tune | None = None


class Case(Section):
    """One line of a table."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Part of file names.")
    table: Table
    groups: list[str] = Field(default_factory=list, description="Tables of sensitivity it is in: what varies there.")
    task: str
    regimes: list[str] = Field(min_length=1)
    seeds: list[int] = Field([1], min_length=1)
    after: str | None = None
    legs: list[Leg] = Field(min_length=1)


@dataclass(frozen=True)
class CaseRun:
    """One run."""

    case: Case
    regime: str
    seed: int
    settings: tuple[Overrides, ...]
    """For each leg everything it has otherwise than the base configuration, but for what `tune` finds."""
    steps: tuple[int, ...]
    """Last step of each leg."""
    before: CaseRun | None
    """The run it goes on from."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.case.name}-{self.regime}-seed{self.seed}"


class Cases(Section):
    """A whole study."""

    tasks: dict[str, Task] = Field(min_length=1)
    cases: list[Case] = Field(min_length=1)

    @model_validator(mode="after")
    def _starts_from_something(self) -> Cases:
        without = [name for name, task in self.tasks.items() if not task.warm_start and task.model_dir is None]
        if without:
            raise ValueError(f"tasks: {', '.join(without)}: a random model learns nothing; warm_start or model_dir")
        return self

    @model_validator(mode="after")
    def _refers_to_what_is_there(self) -> Cases:
        problems = []
        repeated = [name for name, count in Counter(case.name for case in self.cases).items() if count > 1]
        if repeated:
            problems.append(f"cases: {', '.join(repeated)}: more than once")
        earlier: dict[str, Case] = {}
        for case in self.cases:
            problems += _problems(case, self.tasks.get(case.task), earlier)
            earlier[case.name] = case
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def runs(self) -> Iterator[CaseRun]:
        """All runs, each after the one it goes on from."""
        found: dict[tuple[str, str, int], CaseRun] = {}
        for case in self.cases:
            task = self.tasks[case.task]
            for regime in case.regimes:
                for seed in case.seeds:
                    before = None if case.after is None else found[case.after, regime, seed]
                    current = task.common | task.regimes[regime] if before is None else before.settings[-1]
                    last = 0 if before is None else before.steps[-1]
                    settings, steps = [], []
                    for leg in case.legs:
                        current, last = current | leg.overrides, last + leg.steps
                        settings.append(current)
                        steps.append(last)
                    run = CaseRun(case, regime, seed, tuple(settings), tuple(steps), before)
                    found[case.name, regime, seed] = run
                    yield run

    def directory(self, run: CaseRun) -> str:
        """Where a run is kept: another name as soon as anything it depends on is another."""
        task = self.tasks[run.case.task]
        legs = [leg.model_dump() for leg in run.case.legs]
        before = None if run.before is None else self.directory(run.before)
        return f"{run.name}-{digest([self.origin(run.case.task), task.regimes[run.regime], task.common, legs, before])}"

    def origin(self, task: str) -> str:
        """Identifies the base configuration, the model and the warm start of a task."""
        own = self.tasks[task]
        phases = [phase.model_dump() for phase in own.warm_start]
        start = own.model if own.model_dir is None else own.model_dir
        return digest([(ROOT / own.config).read_text(encoding="utf-8"), own.generate, start, phases])


def _problems(case: Case, task: Task | None, earlier: dict[str, Case]) -> Iterator[str]:
    if task is None:
        yield f"{case.name}: no task {case.task}"
    else:
        yield from (f"{case.name}: task {case.task} has no regime {r}" for r in case.regimes if r not in task.regimes)
    if case.after is None:
        if case.legs[0].tune is not None:
            yield f"{case.name}: the first leg has no run before it to tune from"
        return
    before = earlier.get(case.after)
    if before is None:
        yield f"{case.name}: after={case.after}: no such case before it"
    elif before.task != case.task or not {*case.regimes} <= {*before.regimes} or not {*case.seeds} <= {*before.seeds}:
        yield f"{case.name}: after={case.after}: it needs the same task, and the regimes and seeds of {case.name}"
    elif any(leg.tune for leg in before.legs):
        yield f"{case.name}: after={case.after}: tuned settings do not go on to another case"


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a study's file; keys that begin with a dot only hold what others refer to, and are left out.

    Raises:
        ValueError: it is no YAML.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    return {key: value for key, value in content.items() if not key.startswith(".")}


def load_cases(path: Path) -> Cases:
    """Read a study of control, and the configuration of each of its legs.

    Raises:
        ValueError: what is wrong with it, and everything that is wrong with any of the configurations.
    """
    cases = Cases.model_validate(read_yaml(path))
    problems: dict[str, None] = {}
    for run in cases.runs():
        if run.seed == run.case.seeds[0]:
            for number, settings in enumerate(run.settings, start=1):
                config = ROOT / cases.tasks[run.case.task].config
                wrong = read_config(config, arguments(settings))[1]
                problems |= dict.fromkeys(f"{run.name}, leg {number}: {problem}" for problem in wrong)
    if problems:
        raise ValueError("the study cannot run\n" + "\n".join(f"  - {problem}" for problem in problems))
    return cases
