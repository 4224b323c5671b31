"""The study of worst cases, as data: conditions, methods with one setting for all of them, and the cases they make.

    choose   every setting of every method under conditions of their own, on seeds of their own
    report   the setting of each method that did best there, under the conditions of the report

A condition is one or several legs on one task; a method is a set of overrides. The plan and its hypotheses are
docs/study_plan.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from cases import ROOT, Case, Cases, Leg, Task, read_yaml
from grid import Overrides, arguments
from pydantic import Field, model_validator

from megatron_entropic.config.base import Section
from megatron_entropic.config.load import read_config

StageName = Literal["choose", "report"]


class Condition(Section):
    """What all methods are put through."""

    name: str = Field(pattern=r"^[a-z0-9-]+$", description="Part of file names.")
    task: str
    overrides: Overrides = Field(default_factory=dict)
    legs: list[Leg] = Field(min_length=1)
    evaluate_every: int | None = Field(None, ge=1, description="Rollout steps; None: only the last.")

    @property
    def steps(self) -> int:
        """Rollout steps of all legs."""
        return sum(leg.steps for leg in self.legs)

    @property
    def settings(self) -> Overrides:
        """Everything that every method has under this condition."""
        updates = self.overrides.get("algorithm.optimizer_steps_per_rollout", 1)
        return {
            "evaluation.every_steps": self.evaluate_every or self.steps,
            "evaluation.samples_per_prompt": 8,
            "entropy_control.target_schedule.steps": self.steps * updates,
            **self.overrides,
        }


class Method(Section):
    """One row of the tables."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Part of file names.")
    overrides: Overrides = Field(default_factory=dict)
    settings: list[Overrides] = Field([{}], min_length=1)


class Stage(Section):
    """Conditions on seeds."""

    seeds: list[int] = Field(min_length=1)
    conditions: list[Condition] = Field(min_length=1)


class Plan(Section):
    """A whole study."""

    tasks: dict[str, Task] = Field(min_length=1)
    constants: list[str] = Field(min_length=1, description="Methods whose best is what regret is against.")
    primary: list[str] = Field(min_length=1, description="Methods whose worst regret is to be below the constants'.")
    worse: list[tuple[str, str]] = Field([], description="Pairs: the first is to have a larger worst regret.")
    paired: list[tuple[str, str, str]] = Field([], description="Condition, method, and what it is to be above there.")
    choose: Stage
    report: Stage
    methods: list[Method] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_consistent(self) -> Plan:
        names = [method.name for method in self.methods]
        problems = [f"methods: {name}: more than once" for name, count in Counter(names).items() if count > 1]
        pairs = [*self.worse, *(both[1:] for both in self.paired)]
        meant = [*self.constants, *self.primary, *(name for pair in pairs for name in pair)]
        problems += [f"{name}: no such method" for name in dict.fromkeys(meant) if name not in names]
        conditions = [*self.choose.conditions, *self.report.conditions]
        several = Counter(condition.name for condition in conditions)
        problems += [f"conditions: {name}: more than once" for name, count in several.items() if count > 1]
        problems += [f"{one.name}: no task {one.task}" for one in conditions if one.task not in self.tasks]
        if shared := sorted(set(self.choose.seeds) & set(self.report.seeds)):
            problems.append(f"choose and report share seeds {shared}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def stage(self, name: StageName) -> Stage:
        """The stage of that name."""
        return self.choose if name == "choose" else self.report

    def cases(self, name: StageName, seed: int, chosen: Mapping[str, int] | None = None) -> Cases:
        """The cases of one seed: of every condition and method, in this order.

        Args:
            name: the stage.
            seed: one of its seeds.
            chosen: number of the setting of each method; methods that are missing are left out. None: every setting
                of those that have several, since nothing is to be chosen of the others.
        """
        stage = self.stage(name)
        regimes: dict[str, dict[str, Overrides]] = {task: {} for task in self.tasks}
        made = []
        for condition in stage.conditions:
            for method in self.methods:
                for index, setting in enumerate(method.settings):
                    if chosen is None or chosen.get(method.name) == index:
                        regime = f"{condition.name}.{method.name}.{index}"
                        own = condition.settings | method.overrides | setting
                        regimes[condition.task][regime] = own
                        case = Case(
                            name=regime, table="regret", task=condition.task, regimes=[regime], seeds=[seed],
                            legs=condition.legs,
                        )  # fmt: skip
                        made.append(case)
        used = {case.task for case in made}
        tasks = {task: self.tasks[task].model_copy(update={"regimes": regimes[task]}) for task in used}
        return Cases(tasks=tasks, cases=made)


def load_plan(path: Path) -> Plan:
    """Read a plan, and the configuration of each of its legs.

    Raises:
        ValueError: what is wrong with it, and everything that is wrong with any of the configurations.
    """
    plan = Plan.model_validate(read_yaml(path))
    problems: dict[str, None] = {}
    for name in ("choose", "report"):
        cases = plan.cases(name, plan.stage(name).seeds[0])
        for run in cases.runs():
            task = cases.tasks[run.case.task]
            # Where the data will be is another matter than whether the settings go together.
            files = {"evaluation.benchmarks": {key: f"{file}.parquet" for key, file in task.benchmarks.items()}}
            for settings in run.settings:
                wrong = read_config(ROOT / task.config, arguments(settings | files))[1]
                problems |= dict.fromkeys(f"{run.case.name}: {problem}" for problem in wrong)
    if problems:
        raise ValueError("the study cannot run\n" + "\n".join(f"  - {problem}" for problem in problems))
    return plan
