"""The policy as a Hugging Face directory: gathered over tensor and pipeline ranks, written by rank 0."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_entropic.checkpoints.hf import write_hf_directory
from megatron_entropic.checkpoints.run_checkpoints import discard
from megatron_entropic.errors import RunError
from megatron_entropic.policy.publish.gather import RankWeights, sends_weights


def export_hf(output_dir: Path, weights: RankWeights, *, template_dir: Path) -> None:
    """Write the policy for transformers and vLLM, called by all ranks together.

    Args:
        output_dir: new directory; an earlier export there is replaced when the new one is complete.
        weights: parameters of this rank, synchronised.
        template_dir: Hugging Face directory whose config and tokenizer are copied.

    Raises:
        RunError: on every rank, when rank 0 cannot write.
    """
    problem: list[str | None] = [None]
    if sends_weights(weights.parallel):
        tensors = weights.gathered("export")
        if weights.parallel.rank == 0:
            try:
                write_hf_directory(output_dir, tensors, template_dir, overwrite=True)
            except (OSError, ValueError) as error:
                problem = [f"export to {output_dir} failed: {error}"]
        # Other ranks send here. After a failure rank 0 receives what is left, so that nobody waits for it.
        for _ in tensors:
            pass
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise RunError(problem[0])


# Hugging Face exports of a running job: gathered between two steps, written while the next ones run.
#
#   | all ranks --gather_hf_tensors--> rank 0: a copy in host memory --thread--> files, renamed when complete
#
# At most one export is being written; the next one waits for it. A failure is raised when the run asks, once a step.


class BackgroundExport:
    """One policy rank's part in exports. All ranks call `begin` together; only rank 0 writes."""

    def __init__(self, weights: RankWeights, *, template_dir: Path, keep_last: int) -> None:
        """Remember what to write.

        Args:
            weights, template_dir: as in `export_hf`.
            keep_last: number of exports to keep beside each other.
        """
        self._weights = weights
        self._template_dir = template_dir
        self._keep_last = keep_last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._writing: tuple[Path, Future[None]] | None = None

    def begin(self, output_dir: Path) -> None:
        """Copy the weights as they are now and start to write them; an earlier export is awaited first.

        Raises:
            RunError: on rank 0, the earlier export failed.
        """
        self.check(wait=True)
        if not sends_weights(self._weights.parallel):
            return
        copy = {name: tensor.to("cpu", copy=True) for name, tensor in self._weights.gathered("export")}
        if self._weights.parallel.rank == 0:
            self._writing = output_dir, self._thread.submit(self._write, output_dir, copy)

    def check(self, *, wait: bool) -> None:
        """Raise if the last export has failed; with `wait` not before it has ended.

        Raises:
            RunError: naming directory and reason, once.
        """
        if self._writing is None or not (wait or self._writing[1].done()):
            return
        output_dir, ended = self._writing
        self._writing = None
        try:
            ended.result()
        except (OSError, ValueError) as error:
            raise RunError(f"export to {output_dir} failed: {error}") from error

    def _write(self, output_dir: Path, tensors: dict[str, torch.Tensor]) -> None:
        write_hf_directory(output_dir, tensors.items(), self._template_dir, overwrite=True)
        # Hidden folders are exports that are being written or replaced.
        complete = sorted(path for path in output_dir.parent.iterdir() if path.name[0] != ".")
        for path in complete[: -self._keep_last]:
            discard(path)
