"""Files of a run's rollouts: which steps are kept, within a number of files and of bytes.

rollouts/step_000020.parquet  --+
rollouts/step_000040.parquet    |  every logging.rollouts_every_steps: the oldest go beyond the limits
rollouts/step_000060.parquet  --+
rollouts/step_000047.parquet       asked for by train.record_steps, or with a skipped update: stay
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megatron_entropic.config.run import LoggingConfig
from megatron_entropic.errors import UserError
from megatron_entropic.observability.records import (
    recorded_metrics,
    recorded_steps,
    rollouts_path,
    write_rollouts,
)
from megatron_entropic.types import Scores, TrainingBatch

SKIPPED = "optimizer/skipped"
_BYTES_PER_MB = 10**6


class RolloutLog:
    """Writes the rollouts of some steps of a run, and deletes those that are beyond its limits."""

    def __init__(self, run_dir: Path, config: LoggingConfig, record_steps: Collection[int]) -> None:
        """Keep files in `run_dir` as `config` says; `record_steps` are recorded in any case and never deleted."""
        self._run_dir, self._config, self._record_steps = run_dir, config, frozenset(record_steps)

    def due(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether a step's rollouts are kept: every so many steps, where asked for, or where an update was skipped."""
        every = self._config.rollouts_every_steps
        return step in self._record_steps or (every > 0 and step % every == 0) or metrics[SKIPPED] > 0

    def write(self, step: int, batch: TrainingBatch, scores: Scores, metrics: dict[str, float]) -> None:
        """Write one step, see `write_rollouts`, then keep to the limits.

        Raises:
            OSError: the disk refuses; the message names the file.
        """
        write_rollouts(rollouts_path(self._run_dir, step), step, batch, scores, metrics)
        self._prune(step)

    def truncate_after(self, step: int) -> None:
        """Forget the steps after `step`, which will be computed again; what `replay` may be asked for stays."""
        for later in recorded_steps(self._run_dir):
            if later > step and not self._stays(later):
                rollouts_path(self._run_dir, later).unlink()

    def _prune(self, newest: int) -> None:
        """Delete the oldest until the limits hold. The newest stays, however large it is."""
        keep_last, keep_mb = self._config.rollouts_keep_last, self._config.rollouts_keep_mb
        kept, kept_bytes = 0, 0
        for step in reversed(recorded_steps(self._run_dir)):
            if step > newest or self._stays(step):
                continue
            path = rollouts_path(self._run_dir, step)
            kept, kept_bytes = kept + 1, kept_bytes + path.stat().st_size
            within = (keep_last is None or kept <= keep_last) and (
                keep_mb is None or kept_bytes <= keep_mb * _BYTES_PER_MB
            )
            if step < newest and not within:
                path.unlink()

    def _stays(self, step: int) -> bool:
        """Whether a recorded step is never deleted: asked for, its update was skipped, or its file is not readable."""
        if step in self._record_steps:
            return True
        try:
            return bool(recorded_metrics(rollouts_path(self._run_dir, step)).get(SKIPPED))
        except UserError:  # whoever looks at it is told by `rollouts` or `replay`; what cannot be read is not deleted
            return True
