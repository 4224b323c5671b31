"""Tasks, trajectories and batches as tests need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_entropic.types import Reward, Segment, Task, Trajectory


def task_of(index: int, tokens: Sequence[int] = (1,), text: str = "", truth: Any = None, **fields: Any) -> Task:
    return Task(index, np.array(tokens, np.int32), text, truth, **fields)


def trajectory_of(
    task: Task,
    sample_index: int = 0,
    tokens: Sequence[int] = (1,),
    text: str = "",
    *,
    logprobs: Sequence[float] | None = None,
    finish_reason: str = "stop",
    version: int = 0,
) -> Trajectory:
    """One of a single segment; without log-probs all are 0."""
    values = np.zeros(len(tokens), np.float32) if logprobs is None else np.array(logprobs, np.float32)
    segment = Segment(np.array(tokens, np.int32), values, version)
    return Trajectory(task, sample_index, (segment,), finish_reason, text)


def reward_of(value: float, status: str = "ok") -> Reward:
    return Reward(value, value, status)
