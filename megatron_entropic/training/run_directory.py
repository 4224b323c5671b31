"""The files of a run on disk, and how it continues from there.

output_dir/
    config.yaml          the resolved configuration of the newest attempt
    data_report.txt      rows of the training files: read, skipped, dropped, found twice or in a benchmark
    settings.jsonl       one object for each part of the run under the same settings: first step, configuration
    metrics.jsonl        one object a step; the truth. tensorboard/ and wandb/ repeat it
    warm_start.jsonl     one object a supervised step
    restarts.jsonl       why processes were started anew (cluster.max_restarts, cluster.max_engine_restarts)
    stacks/              what every process was doing when one did not answer in time
    timeline.json        who worked when in the newest steps, for Perfetto, see logging.timeline_steps
    schedule/            when requests and weights reached each engine, with rollout.lag
    in_flight/           what was in flight at each checkpoint, with rollout.lag
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
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType

import yaml
from pydantic import ValidationError

from megatron_entropic.checkpoints.run_checkpoints import (
    checkpoint_path,
    latest_checkpoint,
    refuse_fewer_steps,
    refuse_unwanted_resume,
    step_of,
)
from megatron_entropic.cluster.cluster import Cluster
from megatron_entropic.config.load import dump_config
from megatron_entropic.config.run import Config
from megatron_entropic.errors import RunError
from megatron_entropic.observability.settings_history import (
    RunPart,
    model_files,
    read_parts,
    record_part,
    sampled_digest,
)
from megatron_entropic.training.checkpoints import Checkpoints
from megatron_entropic.training.journal import Journal


class RunDirectory:
    """Files of one run, held by one process at a time; a context manager.

    Raises (on entry):
        RunError: another process holds the directory.
        UserError: `run.resume=never` and there is a checkpoint; fewer steps are asked for than are done.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.run.output_dir
        self.export_dir = self.path / "hf"
        self.journal = Journal(config)
        self.checkpoints = Checkpoints(config, self.journal)
        self._config = config
        self._open = ExitStack()

    def __enter__(self) -> RunDirectory:
        config = self._config
        with ExitStack() as opened:
            self.path.mkdir(parents=True, exist_ok=True)
            opened.enter_context(self._lock())
            self._newest = latest_checkpoint(self.checkpoints.path)
            refuse_unwanted_resume(config.run.resume, self._newest)
            refuse_fewer_steps(config.train.steps, self._newest)
            self._keep_settings_before()
            dump_config(config, self.path / "config.yaml")
            opened.enter_context(self.journal)
            self.journal.progress.resume(step_of(self._newest))
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if error is not None:
                self._keep_traceback(error)

    def _keep_traceback(self, error: BaseException) -> None:
        path = self.path / "error.log"
        try:
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        except OSError as refusal:  # often of the same cause, and `error` is what the user has to read
            self.journal.progress.log(f"cannot write to {path}: {refusal.strerror}")

    @property
    def finished(self) -> bool:
        """Whether the last step is saved and exported, so that nothing is left to do; says so."""
        steps = self._config.train.steps
        exported = self.export_dir.is_dir() or not self._config.checkpoint.export_hf
        finished = exported and self._newest == checkpoint_path(self.checkpoints.path, steps)
        if finished:
            self.journal.progress.log(f"all {steps} steps of train.steps are done; nothing is left to train")
        return finished

    def resume(self, cluster: Cluster) -> int | None:
        """Restore the newest intact checkpoint into all policy ranks; returns its step, None if there is none.

        Metrics and rollouts of later steps, which will be computed again, are cut off.

        Raises:
            CheckpointError: there are checkpoints, but none that can be used; nothing was changed.
        """
        step = self.checkpoints.restore(cluster)
        self.journal.continue_after(step)
        if step is not None:
            self.journal.progress.log(f"resuming after step {step} from {checkpoint_path(self.checkpoints.path, step)}")
        self._record_settings(step or 0)
        return step

    def _keep_settings_before(self) -> None:
        """Record the settings of a run that an older version began: without settings.jsonl they are in config.yaml."""
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
        """Record the settings that the run goes on with after `step`, and show those that are not what they were."""
        config, before = self._config, read_parts(self.path)
        files = {"data.train_files": config.data.train_files, "model.hf_dir": model_files(config.model.hf_dir)}
        contents = {key: sampled_digest(paths) for key, paths in files.items()}
        part = RunPart(step + 1, config.model_dump(mode="json"), os.getcwd(), contents)
        changed = record_part(self.path, part, [_with_defaults(earlier) for earlier in before])
        if changed:
            lines = "".join(f"\n  {change}" for change in changed)
            self.journal.progress.log(
                f"warning: settings differ from step {step + 1} on; both are in settings.jsonl:{lines}"
            )

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
