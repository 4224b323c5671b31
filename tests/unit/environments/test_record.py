"""Answers of environments on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from trajectories import task_of

from megatron_entropic.environments.conversation import Answer, Answered, Call, Key
from megatron_entropic.environments.record import CONVERSATIONS_FOLDER, recorded_environments
from megatron_entropic.files.jsonl import read_json_lines


class Slow:
    """Environments that answer when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Answered] = []

    def ask(self, call: Call, answered: Answered) -> None:
        self.asked.append(answered)

    def check(self) -> None: ...

    def take_metrics(self) -> dict[str, float]:
        return {}


def test_an_answer_that_comes_when_nobody_waits_any_more_reaches_nobody(tmp_path: Path) -> None:
    """A run that begins anew after a lost process asks again; the answers to the first attempt may still come."""
    slow, came = Slow(), list[Answer]()
    with recorded_environments(slow, tmp_path, None) as environments:
        assert environments is not None
        for turn in range(2):
            environments.ask(Call(Key("3/1", 0, turn), task_of(1), (), (), 9, 9), came.append)
        slow.asked[0](Answer(np.array([4, 5], np.int32), message="half a pair: \udc80", seconds=0.5))
    slow.asked[1](Answer(None, "over", reward=1.0))
    assert [one.seconds for one in came] == [0.5]
    (row,) = read_json_lines(tmp_path / CONVERSATIONS_FOLDER / "step_000003.jsonl")
    assert (row["turn"], row["tokens"], row["message"]) == (0, [4, 5], "half a pair: \\udc80")
    again = Answer.of_row(row)
    assert again.tokens is not None
    assert (again.tokens.tolist(), again.ending, again.seconds) == ([4, 5], "", 0.5)


def test_without_environments_nothing_is_written(tmp_path: Path) -> None:
    with recorded_environments(None, tmp_path, None) as environments:
        assert environments is None
    assert not (tmp_path / CONVERSATIONS_FOLDER).exists()
