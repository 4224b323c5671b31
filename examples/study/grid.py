"""The grid of the study: which runs there are, as data.

    search   every setting of every method, on the seeds of the search, judged by search.parquet
    report   the best setting of each method, on other seeds, judged by heldout.parquet

Every method has equally many settings, so all are tuned with the same budget. With one setting each there is nothing to
search. A setting is a set of overrides of the base configuration, as the target and the gains are; regimes (on-policy,
off-policy) are too, and each chooses its own setting.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from megatron_entropic.config.base import Section
from megatron_entropic.config.load import read_config

Overrides = dict[str, Any]
"""Dotted key of the base configuration: value."""
Stage = Literal["search", "report"]
BENCHMARKS: dict[Stage, str] = {"search": "search", "report": "heldout"}
"""The file that judges the runs of a stage."""


class Phase(Section):
    """Supervised steps on one file, before those on the next."""

    file: Literal["clean", "corrupted"]
    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(0, ge=0)
    sequences_per_step: int = Field(256, ge=1)


class Rows(Section):
    """Rows of the generated files."""

    train: int = Field(8192, ge=1)
    clean: int = Field(115_200, ge=1)
    corrupted: int = Field(76_800, ge=1)


class Method(Section):
    """One row of the tables."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="Part of file names.")
    overrides: Overrides = Field(default_factory=dict)
    settings: list[Overrides] = Field(min_length=1, description="What is searched; the first is taken if one.")


class Grid(Section):
    """The whole study."""

    baseline: str = Field(description="The method that the others are compared with.")
    report_seeds: list[int] = Field(min_length=1)
    search_seeds: list[int] = Field(default_factory=list)
    rows: Rows = Rows()
    warm_start: list[Phase] = Field(min_length=1, description="Once for each seed; all its runs start from the result.")
    common: Overrides = Field(default_factory=dict)
    regimes: dict[str, Overrides] = Field(min_length=1)
    methods: list[Method] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_a_fair_comparison(self) -> Grid:
        problems = []
        counts = {method.name: len(method.settings) for method in self.methods}
        repeated = [name for name, count in Counter(method.name for method in self.methods).items() if count > 1]
        if repeated:
            problems.append(f"methods: {', '.join(repeated)}: more than once")
        if len(set(counts.values())) > 1:
            problems.append(f"methods: every method needs the same number of settings, not {counts}")
        if self.baseline not in counts:
            problems.append(f"baseline={self.baseline}: no such method")
        if shared := sorted(set(self.search_seeds) & set(self.report_seeds)):
            problems.append(f"search_seeds and report_seeds share {shared}")
        if self.searches and not self.search_seeds:
            problems.append("search_seeds: needed where a method has several settings")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def searches(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.methods[0].settings) > 1

    def cells(self, stage: Stage, chosen: Mapping[tuple[str, str], int] | None = None) -> Iterator[Cell]:
        """The runs of a stage.

        Args:
            chosen: (regime, method): the setting to report; missing ones are left out. None: all settings.
        """
        seeds = self.search_seeds if stage == "search" else self.report_seeds
        for seed in seeds:
            for regime, regime_overrides in self.regimes.items():
                for method in self.methods:
                    for index, setting in enumerate(method.settings):
                        if chosen is None or chosen.get((regime, method.name)) == index:
                            overrides = self.common | regime_overrides | method.overrides | setting
                            yield Cell(stage, regime, method.name, index, setting, seed, overrides)


@dataclass(frozen=True)
class Cell:
    """One run."""

    stage: Stage
    regime: str
    method: str
    setting_index: int
    setting: Overrides
    """What tells it from the method's other settings."""
    seed: int
    overrides: Overrides
    """Everything it has otherwise than the base configuration, the seed and its files aside."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.stage}-{self.regime}-{self.method}-{self.setting_index}-seed{self.seed}"

    def directory(self, origin: str) -> str:
        """Where it is kept: another name as soon as anything it depends on is another.

        Args:
            origin: identifies the base configuration and the warm start.
        """
        return f"{self.name}-{digest([origin, self.overrides])}"


def digest(content: Any) -> str:
    """A short name of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def arguments(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as `megatron-entropic train` takes them."""
    return [f"{key}={value if isinstance(value, Path) else json.dumps(value)}" for key, value in overrides.items()]


def load_grid(path: Path) -> Grid:
    """Read a grid.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    return Grid.model_validate(content)


def check_cells(grid: Grid, config: Path) -> None:
    """Read the configuration of every kind of cell, before any runs.

    Raises:
        ValueError: listing everything that is wrong with any of them, once.
    """
    problems: dict[str, None] = {}
    for cell in grid.cells("report"):
        if cell.seed != grid.report_seeds[0]:
            continue
        found, wrong = read_config(config, arguments(cell.overrides))
        where = f"{cell.regime}, {cell.method}, setting {cell.setting_index}"
        if found.evaluation.every_steps == 0 or found.train.steps % found.evaluation.every_steps:
            wrong.append("evaluation.every_steps must divide train.steps: the tables are about the last step")
        problems |= dict.fromkeys(f"{where}: {problem}" for problem in wrong)
    if problems:
        raise ValueError("the grid cannot run\n" + "\n".join(f"  - {problem}" for problem in problems))
