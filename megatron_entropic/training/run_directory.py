"""What a run keeps on disk, and how it continues from there.

output_dir/
    config.yaml          the resolved configuration of the newest attempt
    data_report.txt      rows of the training files: read, skipped, dropped, found twice or in a benchmark
    settings.jsonl       one object for each part of the run under the same settings: first step, configuration
    metrics.jsonl        one object a step; the truth. tensorboard/ and wandb/ repeat it
    warm_start.jsonl     one object a supervised step
    restarts.jsonl       why processes were started anew (cluster.max_restarts, cluster.max_engine_restarts)
    stacks/              what every process was doing when one did not answer in time
    samples.jsonl        some responses of each step
    rollouts/            all responses of some steps, token by token, see logging.rollouts_every_steps
    checkpoints/         resumable state, see checkpoints/run_checkpoints.py
    exports/step_000010/ the policy after a step as a Hugging Face directory, see checkpoint.export_every_steps
    hf/                  the final policy as a Hugging Face directory
    error.log            traceback of the newest failed attempt
"""

from __future__ import annotations

import fcntl
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_entropic.checkpoints.run_checkpoints import (
    checkpoint_path,
    latest_checkpoint,
    refuse_fewer_steps,
    refuse_unwanted_resume,
    step_of,
)
from megatron_entropic.cluster.policy_group import PolicyGroup
from megatron_entropic.config.load import dump_config
from megatron_entropic.config.run import Config
from megatron_entropic.errors import RunError
from megatron_entropic.files.jsonl import JsonLinesWriter
from megatron_entropic.files.text import printable
from megatron_entropic.observability.metrics import MetricsWriter
from megatron_entropic.observability.progress import Progress
from megatron_entropic.observability.records import SampleLog
from megatron_entropic.observability.rollout_log import RolloutLog
from megatron_entropic.observability.settings_history import (
    RunPart,
    model_files,
    read_parts,
    record_part,
    sampled_digest,
)
from megatron_entropic.observability.timing import PhaseClock
from megatron_entropic.observability.yardsticks import mismatch_yardstick
from megatron_entropic.training.checkpoints import Checkpoints
from megatron_entropic.types import Sample, Scores, Sequence

WORKING_PHASES = ("generate", "score", "update", "publish", "evaluate")
"""In which engines or policy ranks are at work; the rest of a step is the driver's."""


class RunDirectory:
    """Files of one run, held by one process at a time; a context manager.

    Raises (on entry):
        RunError: another process holds the directory.
        UserError: `run.resume=never` and there is a checkpoint; fewer steps are asked for than are done.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.run.output_dir
        self.export_dir = self.path / "hf"
        self.clock = PhaseClock()
        self._config = config
        self.checkpoints = Checkpoints(config, self)
        self._rollouts = RolloutLog(self.path, config.logging, config.train.record_steps)
        self._open_files = ExitStack()
        self._began: float | None = time.time()

    def __enter__(self) -> RunDirectory:
        config = self._config
        with ExitStack() as files:
            self.path.mkdir(parents=True, exist_ok=True)
            files.enter_context(self._lock())
            self._newest = latest_checkpoint(self.checkpoints.path)
            refuse_unwanted_resume(config.run.resume, self._newest)
            refuse_fewer_steps(config.train.steps, self._newest)
            self._keep_settings_before()
            dump_config(config, self.path / "config.yaml")
            resolved = config.model_dump(mode="json")
            self._metrics = files.enter_context(
                MetricsWriter(self.path, config.logging, run_name=config.run.name, run_config=resolved)
            )
            self._warm_start = files.enter_context(closing(JsonLinesWriter(self.path / "warm_start.jsonl")))
            self._samples = files.enter_context(closing(SampleLog(self.path, config.logging.samples_per_step)))
            self.progress = files.enter_context(
                Progress(
                    config.train.steps,
                    target=config.entropy_control.fixed_target if config.entropy_control.enabled else None,
                    mismatch=mismatch_yardstick(resolved),
                    title=config.run.name,
                )
            )
            self.progress.resume(step_of(self._newest))
            self._open_files = files.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open_files:
            if error is not None:
                self._keep_traceback(error)

    def _keep_traceback(self, error: BaseException) -> None:
        path = self.path / "error.log"
        try:
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        except OSError as refusal:  # often of the same cause, and `error` is what the user has to read
            self.progress.log(f"cannot write to {path}: {refusal.strerror}")

    @property
    def finished(self) -> bool:
        """Whether the last step is saved and exported, so that nothing is left to do; says so."""
        exported = self.export_dir.is_dir() or not self._config.checkpoint.export_hf
        finished = exported and self._newest == checkpoint_path(self.checkpoints.path, self._config.train.steps)
        if finished:
            self.progress.log(f"all {self._config.train.steps} steps of train.steps are done; nothing is left to train")
        return finished

    def resume(self, policy: PolicyGroup) -> int | None:
        """Restore the newest intact checkpoint into all policy ranks; returns its step, None if there is none.

        Metrics and rollouts of later steps, which will be computed again, are cut off.

        Raises:
            CheckpointError: there are checkpoints, but none that can be used; nothing was changed.
        """
        step = self.checkpoints.restore(policy)
        done = -1 if step is None else step
        self._metrics.truncate_after(done)
        self._samples.truncate_after(done)
        self._rollouts.truncate_after(done)
        self.progress.resume(max(done, 0))
        if step is None:
            self._warm_start.truncate_after(done)
        else:
            self.progress.log(f"resuming after step {step} from {checkpoint_path(self.checkpoints.path, step)}")
        self._record_settings(max(done, 0))
        return step

    def _keep_settings_before(self) -> None:
        """Runs of older versions have no settings.jsonl: what they were computed under is in config.yaml until now."""
        path = self.path / "config.yaml"
        if self._newest is None or read_parts(self.path) or not path.is_file():
            return
        try:
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):  # lost already, and no reason not to go on
            return
        if isinstance(before, dict):
            record_part(self.path, RunPart(1, before), [])

    def _record_settings(self, step: int) -> None:
        """Keep under which settings the run goes on after `step`, and say which of them are not what they were."""
        config, before = self._config, read_parts(self.path)
        files = {"data.train_files": config.data.train_files, "model.hf_dir": model_files(config.model.hf_dir)}
        contents = {key: sampled_digest(paths) for key, paths in files.items()}
        part = RunPart(step + 1, config.model_dump(mode="json"), os.getcwd(), contents)
        changed = record_part(self.path, part, [_with_defaults(earlier) for earlier in before])
        if changed:
            lines = "".join(f"\n  {change}" for change in changed)
            self.progress.log(f"warning: settings differ from step {step + 1} on; both are in settings.jsonl:{lines}")

    def report_data(self, lines: list[str]) -> None:
        """Show what became of the rows of the training files, and keep it."""
        text = printable("\n".join(lines))
        (self.path / "data_report.txt").write_text(text + "\n", encoding="utf-8")
        self.progress.log(text)

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Write one step's metrics and show them; after an attempt's first one, how long it took to get there."""
        self._metrics.write(step, metrics)
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

    def record_restart(self, restart: int, limit: int, error: RunError) -> None:
        """Write down why everything starts anew, in restarts.jsonl and on the screen."""
        self._write_restart("run", error)
        newest = latest_checkpoint(self.checkpoints.path)
        # One that was being written when the process went counts for nothing.
        begin = f"from {newest}" if newest else "from the beginning: no checkpoint is complete yet"
        self.progress.log(f"{error}\nrestart {restart} of {limit} {begin}")

    def record_engine_restarts(self, losses: list[RunError]) -> dict[str, float]:
        """Write down why engines were replaced within the step, as above; returns their number as a metric."""
        for error in losses:
            self._write_restart("engine", error)
            self.progress.log(f"{error}\nthe engine was replaced within the step")
        return {"cluster/engine_restarts": float(len(losses))}

    def keep_samples(self, step: int, samples: list[Sample]) -> None:
        """Write some responses of a step, for people to read."""
        self._samples.write(step, samples)

    def keep_rollouts(
        self, step: int, samples: list[Sample], batch: list[Sequence], scores: Scores, metrics: dict[str, float]
    ) -> None:
        """Write the step's rollouts with what its update was computed from, if it is one of those to keep."""
        if self._rollouts.due(step, metrics):
            with self.phase("record"):
                self._rollouts.write(step, samples, batch, scores, metrics)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block and show its name."""
        self.progress.phase(name)
        with self.clock.phase(name):
            yield

    def step_time(self, tokens: int) -> dict[str, float]:
        """time/* of the step that ends now, and its throughput: prompt and response tokens over wall time.

        time/driver_fraction is the share of the step in which neither engines nor policy did the step's work,
        time/reward_fraction that of waiting for verdicts after the last response has come.
        """
        times = self.clock.finish_step()
        step_s = times["time/step_s"]
        working_s = sum(times.get(f"time/{phase}_s", 0.0) for phase in WORKING_PHASES)
        times["time/driver_fraction"] = 1 - working_s / step_s
        times["time/reward_fraction"] = times.get("time/reward_s", 0.0) / step_s
        return {**times, "throughput/tokens_per_s": tokens / step_s}

    def _write_restart(self, what: str, error: RunError) -> None:
        with closing(JsonLinesWriter(self.path / "restarts.jsonl")) as restarts:
            cause = {"cause": type(error).__name__, "message": str(error)}
            restarts.append({"time": time.time(), "restarted": what, **cause})

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.path / ".lock").open("w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"another process is running in {self.path}; wait for it, or change run.output_dir"
                ) from error
            yield


def _with_defaults(part: RunPart) -> RunPart:
    """A part that an older version recorded, with the settings it did not know yet at their defaults."""
    try:
        config = Config.model_validate(part.config).model_dump(mode="json")
    except ValidationError:  # settings that are gone; they count as changed
        return part
    return replace(part, config=config)
