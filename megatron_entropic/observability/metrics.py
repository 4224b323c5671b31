"""The metrics of a run: metrics.jsonl is the truth; TensorBoard and Weights & Biases are sinks of the same numbers.

Names are `group/name`, units are in the names (`_s`, `_mb`). A value that is not finite is null in the file.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from megatron_entropic.config.run import LoggingConfig
from megatron_entropic.errors import UserError
from megatron_entropic.files.jsonl import JsonLinesWriter, read_json_lines
from megatron_entropic.files.paths import directory_problem

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_run_id"
TURNS_APART = 8
"""Number of turns whose metrics are apart; what comes later counts as the last of them."""
ENTROPY_BAND = 0.1
"""Entropy within this fraction of its target counts as on target, wherever it is shown."""

_MOST_STEPS = 10**12
"""Largest step that a figure can still count; a larger one is a damaged line."""

logger = logging.getLogger(__name__)


class _Sink(Protocol):
    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes one object a step to metrics.jsonl, then the same to the sinks of the configuration.

    Use as a context manager, or call `close`. On resume call `truncate_after(step of the checkpoint)` before the
    first `write`: later steps are written again, and TensorBoard forgets them too.
    """

    def __init__(
        self,
        output_dir: Path,
        config: LoggingConfig,
        *,
        run_name: str = "run",
        run_config: Mapping[str, Any] | None = None,
    ):
        """Open the file and check that the sinks' libraries are there.

        Args:
            output_dir: the run's directory; created if missing.
            config: the sinks that are asked for.
            run_name: name of the run in W&B.
            run_config: the run's configuration as W&B shows it (`Config.model_dump(mode="json")`).

        Raises:
            UserError: a sink is asked for and its library is not installed.
        """
        check_sinks(config)
        self._wandb_mode = wandb_mode(config.wandb)
        self._output_dir = output_dir
        self._config = config
        self._run_name = run_name
        self._run_config = dict(run_config or {})
        self._lines = JsonLinesWriter(output_dir / METRICS_FILE)
        self._sinks: list[_Sink] | None = None

    def truncate_after(self, step: int) -> None:
        """Forget every step after `step`, and open the sinks to go on from there.

        Raises:
            UserError: `logging.wandb=online`, and W&B does not start.
        """
        for sink in self._sinks or ():
            sink.close()
        self._lines.truncate_after(step)
        self._sinks = self._open_sinks(step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step; it is on disk when this returns.

        Raises:
            OSError: the disk refuses; the message names the file.
        """
        if self._sinks is None:
            self._sinks = self._open_sinks(step)
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._lines.append({"step": step} | row)
        finite = {name: value for name, value in row.items() if value is not None}
        for sink in self._sinks:
            sink.write(step, finite)

    def close(self) -> None:
        """Flush and close everything."""
        for sink in self._sinks or ():
            sink.close()
        self._lines.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_sinks(self, first_step: int) -> list[_Sink]:
        sinks: list[_Sink] = []
        if self._config.tensorboard:
            sinks.append(_TensorBoardSink(self._output_dir / "tensorboard", first_step))
        if self._wandb_mode != "off":
            named = {"project": self._config.wandb_project, "name": self._run_name, "config": self._run_config}
            sinks.append(_WandbSink(self._output_dir, self._wandb_mode, self._config.wandb == "online", named))
        return sinks


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl in order of step, the last of each step; a torn last line is left out.

    Raises:
        UserError: no such file, no step in it, or a damaged line; the message names the run.
    """
    path = run_dir / METRICS_FILE
    if not run_dir.exists():
        raise UserError(f"{run_dir}: no such run directory")
    if problem := directory_problem(run_dir):
        raise UserError(f"{run_dir}: {problem}")
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run directory, it has no {METRICS_FILE}")
    rows = read_json_lines(path)
    if not rows:
        raise UserError(f"{run_dir}: {METRICS_FILE} has no complete step yet")
    for number, row in enumerate(rows, start=1):
        step = row.get("step")
        if type(step) is not int or not 0 <= step <= _MOST_STEPS:
            raise UserError(f"{path}, line {number}: no integer 'step' of 0 to {_MOST_STEPS:,}")
    of_step = {row["step"]: row for row in rows}
    return [of_step[step] for step in sorted(of_step)]


def check_sinks(config: LoggingConfig) -> None:
    """Import the sinks' libraries, to find out whether they are there.

    Raises:
        UserError: a sink is asked for and its library is not installed, or WANDB_MODE is none of W&B's words.
    """
    if config.tensorboard:
        _optional_import("tensorboard", "logging.tensorboard=false")
    if wandb_mode(config.wandb) != "off":
        _optional_import("wandb", "logging.wandb=off")


def wandb_mode(setting: str) -> str:
    """Mode of W&B: off, online or offline.

    It is what `logging.wandb` says; where that is auto, WANDB_MODE, or if that is empty whether there is a key.

    Raises:
        UserError: WANDB_MODE is none of W&B's words.
    """
    if setting != "auto":
        return setting
    word = os.environ.get("WANDB_MODE", "").strip().lower()
    if not word:
        return "online" if os.environ.get("WANDB_API_KEY") else "offline"
    modes = {"online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline"}
    modes["disabled"] = "off"
    if word not in modes:
        raise UserError(f"WANDB_MODE={word} in the environment: expected {', '.join(modes)}; or set logging.wandb")
    return modes[word]


class _TensorBoardSink:
    """Sink that writes scalars to RUN_DIR/tensorboard."""

    def __init__(self, log_dir: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run had written from this step on.
        self._writer = SummaryWriter(str(log_dir), purge_step=first_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandbSink:
    """Sink that writes to one W&B run for one run directory: its id is kept there, so that a resumed run goes on in the
    same charts."""

    def __init__(self, output_dir: Path, mode: str, required: bool, named: dict[str, Any]):
        """Start the W&B run.

        Args:
            mode: online or offline.
            required: whether the run fails without W&B's server; otherwise it is recorded offline.
            named: project, name and configuration of the W&B run.
        """
        self._wandb = _optional_import("wandb", "logging.wandb=off")
        arguments = {**named, "id": self._run_id(output_dir / WANDB_ID_FILE), "dir": str(output_dir)}
        try:
            self._run = self._start(mode, arguments)
        except self._wandb.Error as error:
            if required:
                raise UserError(f"logging.wandb=online, but W&B does not start: {error}") from error
            logger.warning("W&B cannot be reached (%s): this run is recorded offline", error)
            self._run = self._start("offline", arguments)
        # The step is a metric like any other, since W&B refuses to write an own step again after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()

    def _start(self, mode: str, arguments: dict[str, Any]) -> Any:
        settings = self._wandb.Settings(silent=True, console="off")
        resume = "allow" if mode == "online" else None
        return self._wandb.init(mode=mode, resume=resume, settings=settings, **arguments)

    def _run_id(self, path: Path) -> str:
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
        run_id = secrets.token_hex(4)
        path.write_text(run_id + "\n", encoding="utf-8")
        return run_id


def _optional_import(module: str, switch: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the library {module!r} is not installed: install it, or set {switch}") from error
