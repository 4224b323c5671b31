"""The policy as a Hugging Face directory: gathered over tensor and pipeline ranks, written by rank 0."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_entropic.checkpoints.hf import write_hf_directory
from megatron_entropic.checkpoints.peft_adapter import write_adapter
from megatron_entropic.checkpoints.run_checkpoints import discard
from megatron_entropic.errors import RunError
from megatron_entropic.policy.publish.gather import AdapterWeights, RankWeights, sends_weights

ADAPTER = "adapter"
"""Folder of an export in which a policy's adapters lie for peft, beside the weights into which they are merged."""


@dataclass(frozen=True)
class Exported:
    """What this rank has of the policy that is exported, synchronised, and the model that it began as."""

    weights: RankWeights
    template_dir: Path
    """Hugging Face directory whose config and tokenizer are copied."""
    adapters: AdapterWeights | None = None

    def copied_adapters(self) -> dict[str, torch.Tensor]:
        """Adapters of the whole model in host memory on rank 0; all ranks that send weights call this together."""
        if self.adapters is None:
            return {}
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.adapters.gathered("export")}

    def write(
        self, output_dir: Path, tensors: Iterable[tuple[str, torch.Tensor]], adapters: dict[str, torch.Tensor]
    ) -> None:
        """Write the directory, in the place of an earlier one; adapters in the folder `adapter` of it.

        Raises:
            OSError, UserError: see `write_hf_directory`.
        """

        def write_adapters(directory: Path) -> None:
            if self.adapters is not None:
                folder, lora = directory / ADAPTER, self.adapters.lora
                write_adapter(folder, adapters, self.weights.parameter_map, lora, str(self.template_dir))

        write_hf_directory(output_dir, tensors, self.template_dir, overwrite=True, and_then=write_adapters)


def export_hf(output_dir: Path, exported: Exported) -> None:
    """Write the policy for transformers and vLLM, called by all ranks together.

    Args:
        output_dir: new directory; an earlier export there is replaced when the new one is complete.

    Raises:
        RunError: on every rank, when rank 0 cannot write.
    """
    problem: list[str | None] = [None]
    weights = exported.weights
    if sends_weights(weights.parallel):
        adapters = exported.copied_adapters()
        tensors = weights.gathered("export")
        if weights.parallel.rank == 0:
            try:
                exported.write(output_dir, tensors, adapters)
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

    def __init__(self, exported: Exported, *, keep_last: int) -> None:
        """Remember what to write; `keep_last` exports are kept beside each other."""
        self._exported = exported
        self._keep_last = keep_last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._writing: tuple[Path, Future[None]] | None = None

    def begin(self, output_dir: Path) -> None:
        """Copy the weights as they are now and start to write them; an earlier export is awaited first.

        Raises:
            RunError: on rank 0, the earlier export failed.
        """
        self.check(wait=True)
        weights = self._exported.weights
        if not sends_weights(weights.parallel):
            return
        adapters = self._exported.copied_adapters()
        copy = {name: tensor.to("cpu", copy=True) for name, tensor in weights.gathered("export")}
        if weights.parallel.rank == 0:
            self._writing = output_dir, self._thread.submit(self._write, output_dir, copy, adapters)

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

    def _write(self, output_dir: Path, tensors: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor]) -> None:
        self._exported.write(output_dir, tensors.items(), adapters)
        # Hidden folders are exports that are being written or replaced.
        complete = sorted(path for path in output_dir.parent.iterdir() if path.name[0] != ".")
        for path in complete[: -self._keep_last]:
            discard(path)
