"""Checkpoints and exports of one run: when they are due, how a run goes on from the newest, what may not be lost.

Their files are the business of `checkpoints/run_checkpoints.py`, their contents that of the policy's ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_entropic.checkpoints.run_checkpoints import (
    CheckpointError,
    checkpoint_path,
    complete_checkpoints,
    intact_checkpoint,
    read_state,
    step_of,
)
from megatron_entropic.cluster.cluster import Cluster
from megatron_entropic.config.run import Config
from megatron_entropic.errors import RunError
from megatron_entropic.rollout.schedule import Moment
from megatron_entropic.training.in_flight import (
    SavedAttempt,
    in_flight_path,
    load_in_flight,
    prune_in_flight,
    save_in_flight,
)
from megatron_entropic.training.journal import Journal
from megatron_entropic.training.rollouts import Rollouts


class Checkpoints:
    """Files of a run's checkpoints and exports, in RUN/checkpoints and RUN/exports."""

    def __init__(self, config: Config, journal: Journal) -> None:
        self.path = config.run.output_dir / "checkpoints"
        self._run_dir = config.run.output_dir
        self._exports = config.run.output_dir / "exports"
        self._config = config.checkpoint
        self._train = config.train
        self._journal = journal

    def restore(self, cluster: Cluster) -> int | None:
        """Load the newest intact checkpoint into all policy ranks; returns its step, None if there is none.

        Before anything is loaded all ranks together read it through, each its share; here only names and sizes are
        compared.

        Raises:
            CheckpointError: there are checkpoints, but none that can be used; nothing was changed.
        """
        accept_unverified = self._config.accept_unverified
        with cluster.training() as policy:
            newest = intact_checkpoint(
                self.path, self._damaged, accept_unverified=accept_unverified, find_changed=policy.changed_files
            )
            return None if newest is None else int(policy.load_checkpoint(newest)["step"])

    def due(self, step: int) -> bool:
        """Whether the run is to be saved after this step: every `checkpoint.every_steps`, at the end, for a replay."""
        every, train = self._config.every_steps, self._train
        return step == train.steps or (every > 0 and step % every == 0) or step + 1 in train.record_steps

    def save(self, cluster: Cluster, step: int, rollouts: Rollouts | None = None) -> None:
        """Save everything that step + 1 depends on; the oldest checkpoints beyond `keep_last` are removed.

        With `checkpoint.asynchronous` it is written while the run goes on; see `check`.
        """
        with self._journal.phase("checkpoint"):
            moment, attempts = (Moment(step, 0, 0), []) if rollouts is None else rollouts.in_flight(step)
            if attempts:
                save_in_flight(in_flight_path(self._run_dir, step), attempts)
            with cluster.training() as policy:
                state = {"step": step, "moment": list(moment), "attempts": len(attempts)}
                policy.save_checkpoint(checkpoint_path(self.path, step), state)
            prune_in_flight(self._run_dir, [step, *map(step_of, complete_checkpoints(self.path))])

    def in_flight(self, step: int) -> tuple[Moment, list[SavedAttempt]]:
        """What was in flight when the checkpoint of `step` was written; nothing where there is none."""
        moment, path = Moment(step, 0, 0), in_flight_path(self._run_dir, step)
        directory = checkpoint_path(self.path, step)
        if directory not in complete_checkpoints(self.path):
            return moment, []
        state = read_state(directory)["state"]["driver"]
        moment = Moment(*state.get("moment", moment))
        if not state.get("attempts"):
            return moment, []
        try:
            attempts = load_in_flight(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            self._journal.progress.log(f"warning: {path} cannot be read ({error}); what was in flight is sampled again")
            return moment, []
        return moment, attempts

    def check(self, cluster: Cluster, *, wait: bool) -> None:
        """Raise the error of the last checkpoint, if it failed; `wait`, for a run about to end, waits for it first."""
        with self._journal.phase("checkpoint"):
            cluster.policy.check_checkpoint(wait=wait)

    def export(self, cluster: Cluster, step: int, *, resumed: bool = False) -> None:
        """Begin the export that is due after this step, if one is; raise the error of an earlier one that failed.

        Args:
            cluster: cluster whose policy is as it is after `step`.
            step: number of the last step done.
            resumed: whether the run continues after `step`, which then is exported only if there was no time for it
                before.
        """
        every = self._config.export_every_steps
        if not every:
            return
        directory = self._exports / f"step_{step:06d}"
        cluster.policy.check_export(wait=False)
        if step and step % every == 0 and not (resumed and directory.exists()):
            with self._journal.phase("export"), cluster.training() as policy:
                policy.begin_export(directory)

    def finish_exports(self, cluster: Cluster) -> None:
        """Wait for the last export of `export`."""
        if self._config.export_every_steps:
            cluster.policy.check_export(wait=True)

    @contextmanager
    def preserving(self, cluster: Cluster, step: int, rollouts: Rollouts | None = None) -> Iterator[None]:
        """If the block fails, save the policy as of `step` before the error goes on: the step is not lost.

        For blocks during which the policy stands still, such as generation. Where it cannot be saved any more, as when
        ranks went with an engine, both errors are told, and what can be done is what the second one allows.
        """
        try:
            yield
        except RunError as error:
            try:
                self.check(cluster, wait=True)
                if not checkpoint_path(self.path, step).exists():
                    self.save(cluster, step, rollouts)
                    self.check(cluster, wait=True)
            except RunError as refusal:
                raise type(refusal)(f"{error}\nstep {step} could not be saved: {refusal}") from error
            raise type(error)(
                f"{error}\nstep {step} is saved in {checkpoint_path(self.path, step)}; "
                "the same command continues after it"
            ) from error

    def _damaged(self, error: CheckpointError) -> None:
        self._journal.progress.log(f"warning: {error}; it is set aside, and the one before is used")
