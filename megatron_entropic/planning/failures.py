"""What checkpoints of a run take, how often something fails on so many GPUs, and how far apart checkpoints should be.

    lost in an interval = cost of a checkpoint + (half an interval + time to write one) for each failure in it
    best interval = sqrt(2 cost x time between failures)      Young 1974, but no less than it takes to write one

The cost is what the steps after a checkpoint wait for it. With `checkpoint.asynchronous` files are written meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

from megatron_entropic.planning.memory import optimizer_bytes_per_element
from megatron_entropic.planning.step import PlannedStep


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a run, and its failures."""

    size_bytes: int
    """Bytes of one checkpoint: weights, moments, and main parameters of bfloat16 weights."""
    write_s: float
    """Seconds until its files are written."""
    blocked_s: float
    """Seconds by which it holds the run up."""
    hours_between_failures: float
    best_every_steps: int
    """Steps between checkpoints for which least time is lost."""
    lost_share: float
    """Share of the time that is lost with the configured interval: checkpoints, and steps that failures undo."""


def checkpoints(step: PlannedStep, gpus: int, step_s: float) -> Checkpoints:
    """Checkpoints of a run on `gpus` GPUs whose steps take `step_s` seconds."""
    hardware, config = step.hardware, step.config
    size = step.table.elements * (step.item_bytes + optimizer_bytes_per_element(step.dtype))
    nodes = -(-step.policy.world_size // hardware.gpus_per_node)
    write_s = size / (nodes * hardware.storage_bytes_per_s)
    # Copies to host memory, over all links of the policy's GPUs at once.
    copied_s = size / (step.policy.world_size * hardware.host_link_bytes_per_s)
    blocked_s = copied_s if config.checkpoint.asynchronous else copied_s + write_s
    between_s = 3600 * hardware.failure_gpu_hours / gpus
    # One is written at a time, and until it is whole the one before is the newest.
    best_s = max(sqrt(2 * blocked_s * between_s), write_s)
    best = max(1, ceil(best_s / step_s))
    every = config.checkpoint.every_steps or config.train.steps
    lost = blocked_s / (every * step_s) + (every * step_s / 2 + write_s) / between_s
    return Checkpoints(size, write_s, blocked_s, between_s / 3600, best, lost)
