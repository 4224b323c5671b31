"""Attempts that were not trained on yet when a checkpoint was written: on disk beside it, and back.

    RUN/in_flight/step_000010.npz     arrays alone, so that reading executes nothing

A run that continues without the file loses no task and trains none twice: it samples again what was in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_entropic.files.atomic import atomic_write
from megatron_entropic.types import Segment

_FINISH_REASONS = ("", "stop", "length")


@dataclass(frozen=True, slots=True, eq=False)
class SavedAttempt:
    """One attempt at a task of a step that is still to be trained on."""

    step: int
    place: int
    """Place of its task in the step, replacements included."""
    sample: int
    task_index: int
    segments: tuple[Segment, ...]
    finish_reason: str
    """Empty while it is not at its end."""
    engine: int
    """Number of the engine that had it; -1 for none."""
    ticket: int
    """Number by which attempts of one engine are ordered."""


def in_flight_path(run_dir: Path, step: int) -> Path:
    """File of what was in flight when the checkpoint of `step` was written."""
    return run_dir / "in_flight" / f"step_{step:06d}.npz"


def save_in_flight(path: Path, attempts: Sequence[SavedAttempt]) -> None:
    """Write attempts, atomically.

    Raises:
        OSError: naming the file.
    """
    segments = [(number, segment) for number, one in enumerate(attempts) for segment in one.segments]
    table = [(a.step, a.place, a.sample, a.task_index, a.engine, a.ticket) for a in attempts]
    with atomic_write(path) as file:
        np.savez(
            file,
            attempts=np.array(table, np.int64).reshape(-1, 6),
            finish_reasons=np.array([_FINISH_REASONS.index(one.finish_reason) for one in attempts], np.int8),
            segments=np.array([(n, s.weights_version, s.tokens.size) for n, s in segments], np.int64).reshape(-1, 3),
            tokens=_joined((segment.tokens for _, segment in segments), np.int32),
            logprobs=_joined((segment.logprobs for _, segment in segments), np.float32),
            policy_logprobs=_joined((segment.sampling_logprobs for _, segment in segments), np.float32),
        )


def load_in_flight(path: Path) -> list[SavedAttempt]:
    """Read what `save_in_flight` wrote.

    Raises:
        ValueError, OSError, KeyError: it cannot be read, or is of another kind.
    """
    with np.load(path, allow_pickle=False) as content:
        table, reasons = content["attempts"], content["finish_reasons"]
        tokens, logprobs, policy_logprobs = content["tokens"], content["logprobs"], content["policy_logprobs"]
        segments: list[list[Segment]] = [[] for _ in table]
        start = 0
        for number, version, size in content["segments"].tolist():
            piece = slice(start, start + size)
            scored = None if np.isnan(policy_logprobs[piece]).any() else policy_logprobs[piece]
            segments[number].append(Segment(tokens[piece], logprobs[piece], version, policy_logprobs=scored))
            start += size
    return [
        SavedAttempt(step, place, sample, index, tuple(parts), _FINISH_REASONS[reason], engine, ticket)
        for (step, place, sample, index, engine, ticket), parts, reason in zip(
            table.tolist(), segments, reasons.tolist(), strict=True
        )
    ]


def prune_in_flight(run_dir: Path, steps: Iterable[int]) -> None:
    """Remove the files that belong to none of `steps`, whose checkpoints are still there."""
    kept = {in_flight_path(run_dir, step) for step in steps}
    for path in (run_dir / "in_flight").glob("step_*.npz"):
        if path not in kept:
            path.unlink()


def _joined(parts: Iterable[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts])
