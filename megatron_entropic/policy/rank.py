"""What the driver may ask of one policy rank, with the types of it. `policy.Policy` answers.

The driver calls all ranks through Ray without loading megatron-core, so this file imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_entropic.config.run import OffloadPart
from megatron_entropic.types import Scores, Sequence
from megatron_entropic.weight_sync.plan import PublishPlan

if TYPE_CHECKING:
    from megatron_entropic.policy.publish.publisher import Published


class PolicyRank(Protocol):
    """One rank's part of the policy. Every method is called on all ranks together."""

    def score(self, sequences: list[Sequence], *, reference: bool = False) -> Scores | None:
        """Log-probs and entropies of this replica's response tokens; None where another rank has them."""

    def update(self, minibatch: list[Sequence]) -> dict[str, float]:
        """One optimizer step on this replica's part of a mini-batch; metrics are global."""

    def warm_start_step(self, sequences: list[Sequence]) -> dict[str, float]:
        """One supervised optimizer step: maximum likelihood of the responses of all replicas."""

    def begin_reinforcement_learning(self) -> None:
        """Fresh optimizer state with the schedule of the `optimizer` section; ends the warm start."""

    def save_checkpoint(self, directory: Path, driver_state: dict[str, Any]) -> None:
        """Write everything this run needs to go on, with the driver's own JSON state, atomically."""

    def check_checkpoint(self, wait: bool) -> None:
        """Raise what the last checkpoint failed with; with `wait` after it has ended."""

    def load_checkpoint(self, directory: Path) -> dict[str, Any]:
        """Restore a checkpoint; returns the driver's state."""

    def export_hf(self, output_dir: Path) -> None:
        """Write the policy as a Hugging Face directory."""

    def begin_export(self, output_dir: Path) -> None:
        """Copy the weights and write them as a Hugging Face directory in the background."""

    def check_export(self, wait: bool) -> None:
        """Raise what the last background export failed with; with `wait` after it has ended."""

    def publish_plan(self) -> PublishPlan:
        """The buckets that `publish` sends, in order."""

    def open_transport(self, receivers: int) -> dict[str, Any]:
        """Begin a weight-transfer rendezvous with `receivers` engine workers; sending ranks return how to connect."""

    def accept_receivers(self) -> None:
        """Wait until all engine workers have joined."""

    def publish(self) -> Published:
        """Send the current weights to all engines, which must be receiving."""

    def offload(self, parts: tuple[OffloadPart, ...] = ...) -> dict[str, float]:
        """Give device memory back until the next call that needs what was in it; returns MiB by kind."""

    def peak_memory_mb(self) -> float:
        """Highest memory use of this rank so far, MiB."""
