"""Attempts that were not trained on yet when a checkpoint was written: on disk beside it, and back.

    RUN/in_flight/step_000010.npz     arrays alone, so that reading executes nothing

A run that continues without the file loses no task and trains none twice: it samples again what was in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from megatron_entropic.environments.conversation import Ending
from megatron_entropic.files.atomic import atomic_write
from megatron_entropic.types import NEW_CONTEXT, NO_VERSION, Segment, Tokens, Verdict

_FINISH_REASONS = ("", "stop", "length")
_ENDINGS: tuple[Ending, ...] = get_args(Ending)
_STATUSES: tuple[Literal["ok", "timeout", "error"], ...] = ("ok", "timeout", "error")


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
    """Why its last turn ended; empty while that is being written."""
    engine: int
    """Number of the engine that had it; -1 for none."""
    ticket: int
    """Number by which attempts of one engine are ordered."""
    prompt: Tokens | None = None
    """Token ids that its environment began with, [P] int32; None: those of its task."""
    ending: Ending = ""
    """Why it is at its end; empty while it goes on."""
    verdict: Verdict | None = None
    """What its environment said of it at the end."""


def in_flight_path(run_dir: Path, step: int) -> Path:
    """File of what was in flight when the checkpoint of `step` was written."""
    return run_dir / "in_flight" / f"step_{step:06d}.npz"


def save_in_flight(path: Path, attempts: Sequence[SavedAttempt]) -> None:
    """Write attempts, atomically.

    Raises:
        OSError: naming the file.
    """
    segments = [(number, segment) for number, one in enumerate(attempts) for segment in one.segments]
    prompts = [np.empty(0, np.int32) if one.prompt is None else one.prompt for one in attempts]
    verdicts = [one.verdict or Verdict("ok", np.nan) for one in attempts]
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
            prompts=_joined(prompts, np.int32),
            prompt_sizes=np.array([prompt.size for prompt in prompts], np.int64),
            endings=np.array([_ENDINGS.index(one.ending) for one in attempts], np.int8),
            verdict_statuses=np.array([_STATUSES.index(one.status) for one in verdicts], np.int8),
            verdict_rewards=np.array([one.reward for one in verdicts], np.float64),
            verdict_messages=np.array([one.message for one in verdicts], np.str_),
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
        start = written = 0
        for number, version, size in content["segments"].tolist():
            own, start = tokens[start : start + size], start + size
            if version in (NO_VERSION, NEW_CONTEXT):
                of_environment = Segment.of_environment if version == NO_VERSION else Segment.of_context
                segments[number].append(of_environment(own))
                continue
            piece, written = slice(written, written + size), written + size
            scored = None if np.isnan(policy_logprobs[piece]).any() else policy_logprobs[piece]
            segments[number].append(Segment(own, logprobs[piece], version, policy_logprobs=scored))
        conversations = _conversations(content, len(table))
    return [
        SavedAttempt(step, place, sample, index, tuple(parts), _FINISH_REASONS[reason], engine, ticket, *of_environment)
        for (step, place, sample, index, engine, ticket), parts, reason, of_environment in zip(
            table.tolist(), segments, reasons.tolist(), conversations, strict=True
        )
    ]


def _conversations(content: Any, count: int) -> list[tuple[Tokens | None, Ending, Verdict | None]]:
    """Prompt, ending and verdict of each attempt; an older version of the package wrote none."""
    if "endings" not in content.files:
        return [(None, "", None)] * count
    ends = content["prompt_sizes"].cumsum()
    prompts = np.split(content["prompts"], ends[:-1]) if count else []
    statuses, rewards, messages = (content[f"verdict_{name}"].tolist() for name in ("statuses", "rewards", "messages"))
    verdicts = [
        None if status == 0 and np.isnan(reward) else Verdict(_STATUSES[status], reward, message)
        for status, reward, message in zip(statuses, rewards, messages, strict=True)
    ]
    return [
        (prompt if prompt.size else None, _ENDINGS[ending], verdict)
        for prompt, ending, verdict in zip(prompts, content["endings"].tolist(), verdicts, strict=True)
    ]


def prune_in_flight(run_dir: Path, steps: Iterable[int]) -> None:
    """Remove the files that belong to none of `steps`, whose checkpoints are still there."""
    kept = {in_flight_path(run_dir, step) for step in steps}
    for path in (run_dir / "in_flight").glob("step_*.npz"):
        if path not in kept:
            path.unlink()


def _joined(parts: Iterable[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts])
