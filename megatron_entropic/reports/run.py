"""A finished or running run, read back from its directory, and the few numbers that sum it up."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from megatron_entropic.config.names import controller_entry
from megatron_entropic.errors import UserError, reading
from megatron_entropic.files.jsonl import read_json_lines
from megatron_entropic.observability.metrics import ENTROPY_BAND, read_metrics
from megatron_entropic.observability.records import SAMPLES_FILE
from megatron_entropic.observability.settings_history import RunPart, parts_of_steps, read_parts
from megatron_entropic.observability.values import as_number, setting_of
from megatron_entropic.observability.yardsticks import MismatchYardstick, mismatch_yardstick

CONFIG_FILE = "config.yaml"
LAST_STEPS = 20
_PHASE = re.compile(r"time/\w+_s")


@dataclass(frozen=True)
class Run:
    """Settings, metrics and samples of a run, as its directory holds them."""

    path: Path
    name: str
    rows: list[dict[str, Any]]
    """Rows of metrics.jsonl, one a step."""
    config: dict[str, Any]
    """The resolved configuration; empty if it is missing."""
    config_text: str
    samples: list[dict[str, Any]]
    parts: list[RunPart] = field(default_factory=list)
    """Settings under which parts of the steps were computed; empty where they were not recorded."""

    @property
    def steps(self) -> list[int]:
        """The step of each row."""
        return [row["step"] for row in self.rows]

    def series(self, name: str) -> list[float]:
        """The values of a metric, one for each row; NaN where it is missing, not finite or not a number."""
        return [as_number(row.get(name), math.nan) for row in self.rows]

    def finite(self, name: str) -> list[float]:
        """The finite values of a metric."""
        return [value for value in self.series(name) if math.isfinite(value)]

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted key."""
        return setting_of(self.config, key, default)

    def number(self, key: str, default: float) -> float:
        """A number of the configuration by its dotted key; the default also where something else stands there."""
        return as_number(self.setting(key), default)

    @cached_property
    def stretches(self) -> list[Run]:
        """The run cut into the steps that were computed under the same settings, each as a run of its own, in order."""
        parts = parts_of_steps(self.parts)
        if len(parts) < 2:
            return [self]
        bounds = [*(part.first_step for part in parts[1:]), math.inf]
        runs, first = [], -math.inf
        for part, end in zip(parts, bounds, strict=True):
            rows = [row for row in self.rows if first <= row["step"] < end]
            if rows:
                runs.append(replace(self, rows=rows, config=part.config, parts=[part]))
            first = end
        return runs

    def at(self, step: int) -> Run:
        """The same run with the settings that a step was computed under."""
        before = [part for part in self.parts if part.first_step <= step]
        return replace(self, config=before[-1].config, parts=before[-1:]) if before else self

    @cached_property
    def target(self) -> float | None:
        """The entropy target in nats; None where nothing is controlled."""
        if self.setting("entropy_control.controller") == "off":
            return None
        logged = self.finite("entropy/target")
        configured = self.number("entropy_control.target", math.nan)
        return logged[-1] if logged else configured if math.isfinite(configured) else None

    @property
    def mismatch_yardstick(self) -> MismatchYardstick | None:
        """The usual range of mismatch/logprob_abs_mean under these settings; None where it is not known."""
        return mismatch_yardstick(self.config)

    @property
    def phases(self) -> list[str]:
        """Names of the phases that were timed, in order of first appearance."""
        names = {key: None for row in self.rows for key in row if _PHASE.fullmatch(key) and key != "time/step_s"}
        return [name.removeprefix("time/").removesuffix("_s") for name in names]


@dataclass(frozen=True)
class Summary:
    """The numbers of a run that fit on cards; None where the run does not say."""

    steps: int
    planned_steps: int | None
    reward: float | None
    """Mean reward of the last steps."""
    reward_start: float | None
    """Mean reward of the first steps."""
    entropy: float | None
    """Mean entropy of the last steps, in nats."""
    target: float | None
    tracking_error: float | None
    """Mean |H - target| over the last steps, each step against its own target, nats."""
    saturated: float | None
    """Share of the steps since the settings last changed with alpha at its limit; None where alpha does not follow the
    entropy."""
    actuated: float | None
    """Share of the last steps' tokens that alpha acts on: pi > tau and A != 0."""
    mismatch: float | None
    """Mean |log-prob difference| between policy and engines over the last steps, nats a token."""
    worst_mismatch: float | None
    """The largest |log-prob difference| of a token in any step, nats."""
    tokens_per_s: float | None
    """Median of the steps' tokens per second."""
    hours: float | None

    @property
    def on_target(self) -> bool:
        """Whether entropy ended within `ENTROPY_BAND` of its target."""
        return self.tracking_error is not None and self.tracking_error <= ENTROPY_BAND * (self.target or 0.0)


def load_run(path: Path) -> Run:
    """Read a run directory.

    Raises:
        UserError: no metrics, or damaged files; the message names the run.
    """
    rows = read_metrics(path)
    config_path, samples_path = path / CONFIG_FILE, path / SAMPLES_FILE
    with reading(config_path):
        text = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    try:
        config = (yaml.safe_load(text) or {}) if text else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{config_path}: not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{config_path}: expected sections, found {type(config).__name__}")
    samples = read_json_lines(samples_path) if samples_path.is_file() else []
    section = config.get("run")
    name = str(section["name"]) if isinstance(section, dict) and section.get("name") else path.resolve().name
    return Run(path, name, rows, config, text, samples, read_parts(path))


def summarise(run: Run) -> Summary:
    """Compute the numbers of a run's cards; those of its control are of the steps since the settings last changed."""
    whole, run = run, run.stretches[-1]
    entropy = run.finite("entropy/mean")[-LAST_STEPS:]
    rewards, alpha = whole.finite("reward/mean"), run.finite("entropy/alpha")
    actuated = run.finite("entropy/actuated_fraction")[-LAST_STEPS:]
    mismatch, worst = whole.finite("mismatch/logprob_abs_mean"), whole.finite("mismatch/logprob_abs_max")
    speed = whole.finite("throughput/tokens_per_s")
    seconds = whole.finite("time/step_s")
    target = run.target
    errors = [
        abs(value - (run.target or 0.0) if math.isnan(aim) else value - aim)
        for value, aim in zip(run.series("entropy/mean"), run.series("entropy/target"), strict=True)
        if math.isfinite(value)
    ][-LAST_STEPS:]
    feedback = controller_entry(str(run.setting("entropy_control.controller", "pi"))).answers_error
    return Summary(
        steps=run.steps[-1],
        planned_steps=int(whole.number("train.steps", 0)) or None,
        reward=fmean(rewards[-LAST_STEPS:]) if rewards else None,
        reward_start=fmean(rewards[:LAST_STEPS]) if len(rewards) >= 2 * LAST_STEPS else None,
        entropy=fmean(entropy) if entropy else None,
        target=target,
        tracking_error=fmean(errors) if errors and target is not None else None,
        saturated=fmean(abs(value) >= 1 for value in alpha) if alpha and target is not None and feedback else None,
        actuated=fmean(actuated) if actuated and target is not None else None,
        mismatch=fmean(mismatch[-LAST_STEPS:]) if mismatch else None,
        worst_mismatch=max(worst) if worst else None,
        tokens_per_s=median(speed) if speed else None,
        hours=sum(seconds) / 3600 if seconds else None,
    )
