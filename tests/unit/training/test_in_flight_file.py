"""Attempts in flight at a checkpoint, on disk and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_entropic.training.in_flight import (
    SavedAttempt,
    in_flight_path,
    load_in_flight,
    prune_in_flight,
    save_in_flight,
)
from megatron_entropic.types import Segment


def _segment(*tokens: int, version: int, scored: bool) -> Segment:
    values = -np.array(tokens, np.float32) / 7
    return Segment(np.array(tokens, np.int32), values, version, policy_logprobs=values - 1 if scored else None)


def test_attempts_come_back_as_they_were(tmp_path: Path) -> None:
    attempts = [
        SavedAttempt(
            4, 0, 1, 99, (_segment(1, 2, version=2, scored=True), _segment(3, version=3, scored=False)), "", 1, 7
        ),
        SavedAttempt(5, 2, 0, 12, (_segment(8, 9, version=3, scored=False),), "stop", -1, -1),
        SavedAttempt(5, 2, 1, 12, (), "", 0, 3),
    ]
    path = in_flight_path(tmp_path, 3)
    save_in_flight(path, attempts)
    for before, now in zip(attempts, load_in_flight(path), strict=True):
        for name in ("step", "place", "sample", "task_index", "finish_reason", "engine", "ticket"):
            assert getattr(now, name) == getattr(before, name)
        for old, new in zip(before.segments, now.segments, strict=True):
            assert new.tokens.tolist() == old.tokens.tolist()
            assert new.logprobs.tolist() == old.logprobs.tolist()
            assert new.weights_version == old.weights_version
            assert (new.policy_logprobs is None) == (old.policy_logprobs is None)
            if old.policy_logprobs is not None and new.policy_logprobs is not None:
                assert new.policy_logprobs.tolist() == old.policy_logprobs.tolist()


def test_files_go_with_their_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_in_flight(in_flight_path(tmp_path, step), [])
    prune_in_flight(tmp_path, [2, 3])
    assert [in_flight_path(tmp_path, step).exists() for step in (1, 2, 3)] == [False, True, True]
    assert load_in_flight(in_flight_path(tmp_path, 3)) == []
