"""Records that a run makes while it goes on: metrics, samples, rollouts, restarts; on disk and on the screen."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from megatron_entropic.checkpoints.run_checkpoints import latest_checkpoint
from megatron_entropic.config.run import Config
from megatron_entropic.errors import RunError
from megatron_entropic.files.jsonl import JsonLinesWriter
from megatron_entropic.files.text import printable
from megatron_entropic.observability.metrics import MetricsWriter
from megatron_entropic.observability.progress import Progress
from megatron_entropic.observability.records import SampleLog
from megatron_entropic.observability.rollout_log import RolloutLog
from megatron_entropic.observability.timeline import Timeline
from megatron_entropic.observability.timing import PhaseClock
from megatron_entropic.observability.yardsticks import mismatch_yardstick
from megatron_entropic.types import Scores, TrainingBatch

WORKING_PHASES = ("generate", "score", "update", "publish", "evaluate")
"""Phases in which engines or policy ranks are at work; the rest of a step is the driver's."""


class Journal:
    """Writer into a run's directory, which must be there, and onto the screen; a context manager."""

    def __init__(self, config: Config) -> None:
        self._path = config.run.output_dir
        self._config = config
        self._clock = PhaseClock()
        self._rollouts = RolloutLog(self._path, config.logging, config.train.record_steps)
        self.timeline = Timeline(self._path, config.logging.timeline_steps)
        self._open_files = ExitStack()
        self._began: float | None = time.time()

    def __enter__(self) -> Journal:
        config, resolved = self._config, self._config.model_dump(mode="json")
        with ExitStack() as files:
            self._metrics = files.enter_context(
                MetricsWriter(self._path, config.logging, run_name=config.run.name, run_config=resolved)
            )
            self._warm_start = files.enter_context(closing(JsonLinesWriter(self._path / "warm_start.jsonl")))
            self._samples = files.enter_context(closing(SampleLog(self._path, config.logging.samples_per_step)))
            self.progress = files.enter_context(
                Progress(
                    config.train.steps,
                    target=config.entropy_control.fixed_target if config.entropy_control.enabled else None,
                    mismatch=mismatch_yardstick(resolved),
                    title=config.run.name,
                )
            )
            self._open_files = files.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._open_files:
            self.timeline.write()

    def continue_after(self, step: int | None) -> None:
        """Forget the steps after `step`, which will be computed again; with None supervised steps, too."""
        done = -1 if step is None else step
        self._metrics.truncate_after(done)
        self._samples.truncate_after(done)
        self._rollouts.truncate_after(done)
        if step is None:
            self._warm_start.truncate_after(done)
        self.progress.resume(max(done, 0))

    def report_data(self, lines: list[str]) -> None:
        """Show what became of the rows of the training files, and keep it in data_report.txt."""
        text = printable("\n".join(lines))
        (self._path / "data_report.txt").write_text(text + "\n", encoding="utf-8")
        self.progress.log(text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block and show its name."""
        self.progress.phase(name)
        began_s = time.time()
        with self._clock.phase(name):
            yield
        self.timeline.span("driver", name, began_s, time.time())

    def step_time(self, tokens: int) -> dict[str, float]:
        """Metrics time/* of the step that ends now, and its throughput: prompt and response tokens over wall time.

        time/driver_fraction is the share of the step in which neither engines nor policy did the step's work,
        time/reward_fraction that of waiting for verdicts after the last response has come.
        """
        times = self._clock.finish_step()
        step_s = times["time/step_s"]
        working_s = sum(times.get(f"time/{phase}_s", 0.0) for phase in WORKING_PHASES)
        times["time/driver_fraction"] = 1 - working_s / step_s
        times["time/reward_fraction"] = times.get("time/reward_s", 0.0) / step_s
        return {**times, "throughput/tokens_per_s": tokens / step_s}

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Write one step's metrics and show them; after an attempt's first step also show the time to get there."""
        self._metrics.write(step, metrics)
        self.timeline.finish_step()
        self.progress.update(step, metrics)
        if self._began is not None:
            waited = f"first step of this start after {time.time() - self._began:.0f} s"
            if submitted := os.environ.get("ME_SUBMIT_TIME"):
                waited += f", {time.time() - float(submitted):.0f} s after the job was queued"
            self.progress.log(waited)
            self._began = None

    def record_warm_start(self, step: int, metrics: dict[str, Any]) -> None:
        """Write and show one supervised step."""
        self._warm_start.append({"step": step, **metrics})
        total = self._config.warm_start.steps
        if step % max(1, total // 10) == 0 or step == total:
            self.progress.log(f"warm start {step}/{total}  loss {metrics['loss/warm_start']:.3f}")

    def keep(self, step: int, batch: TrainingBatch, scores: Scores, metrics: dict[str, float]) -> None:
        """Write some responses of a step, for people to read, and its rollouts, if it is one of those to keep.

        Args:
            step: number of the step that ends.
            batch: batch with what its updates were computed from.
            scores: scores of its sequences, before the first update.
            metrics: metrics of score pass and updates.
        """
        self._samples.write(step, batch)
        if self._rollouts.due(step, metrics):
            with self.phase("record"):
                self._rollouts.write(step, batch, scores, metrics)

    def record_restart(self, restart: int, limit: int, error: RunError) -> None:
        """Write down why everything starts anew, in restarts.jsonl and on the screen."""
        self._write_restart("run", error)
        newest = latest_checkpoint(self._path / "checkpoints")
        # One that was being written when the process went counts for nothing.
        begin = f"from {newest}" if newest else "from the beginning: no checkpoint is complete yet"
        self.progress.log(f"{error}\nrestart {restart} of {limit} {begin}")

    def record_engine_restarts(self, losses: list[RunError]) -> dict[str, float]:
        """Write down why engines were replaced within the step; returns their number as a metric."""
        for error in losses:
            self._write_restart("engine", error)
            self.progress.log(f"{error}\nthe engine was replaced within the step")
        return {"cluster/engine_restarts": float(len(losses))}

    def _write_restart(self, what: str, error: RunError) -> None:
        with closing(JsonLinesWriter(self._path / "restarts.jsonl")) as restarts:
            cause = {"cause": type(error).__name__, "message": str(error)}
            restarts.append({"time": time.time(), "restarted": what, **cause})
