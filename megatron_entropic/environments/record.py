"""What environments said, written down before it takes effect, and played back to a replay.

    RUN/conversations/step_000012.jsonl     {"group": "12/3", "sample": 0, "turn": 1, "tokens": [...], ...}

A tool need not say the same twice, so a run comes again only with the answers that it had. Of a turn that stands in a
file several times, because the run continued from an earlier checkpoint, the last answer counts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from megatron_entropic.environments.conversation import Answer, Answered, Call, Environments, Key
from megatron_entropic.files.jsonl import JsonLinesWriter, read_json_lines

CONVERSATIONS_FOLDER = "conversations"
_OPEN_FILES = 16


@contextmanager
def recorded_environments(
    environments: Environments | None, run_dir: Path, replayed: Path | None
) -> Iterator[Environments | None]:
    """Yields environments whose answers are written down in `run_dir`; they are those of the run `replayed`, if given.

    Without environments there is nothing to write down.
    """
    if environments is None:
        yield None
        return
    recorded = RecordedEnvironments(environments if replayed is None else PlayedBack(environments, replayed), run_dir)
    with closing(recorded):
        yield recorded


class RecordedEnvironments:
    """Environments whose answers are written down."""

    def __init__(self, environments: Environments, run_dir: Path) -> None:
        """Write what `environments` say into the folder of a run."""
        self._environments, self._folder = environments, run_dir / CONVERSATIONS_FOLDER
        self._lock = threading.Lock()
        self._files: dict[str, JsonLinesWriter] = {}
        self._closed = False

    def ask(self, call: Call, answered: Answered) -> None:

        def write(answer: Answer) -> None:
            with self._lock:
                if self._closed:
                    return  # whoever asked is gone: the run has ended, or begins anew
                # Without a sync: a run that continues after a crash asks again for what is missing.
                self._file_of(call.key.group).append_all([_row(call.key, answer)], durable=False)
            answered(answer)

        self._environments.ask(call, write)

    def check(self) -> None:
        self._environments.check()

    def take_metrics(self) -> dict[str, float]:
        return self._environments.take_metrics()

    def close(self) -> None:
        """Close the files; what is said from now on is neither written down nor handed on."""
        with self._lock:
            self._closed = True
            for file in self._files.values():
                file.close()

    def _file_of(self, group: str) -> JsonLinesWriter:
        """The file of a group's step; the newest few stay open, as those of steps that are in flight together."""
        name = _file_name(group)
        if name not in self._files:
            while len(self._files) >= _OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[name] = JsonLinesWriter(self._folder / name)
        return self._files[name]


class PlayedBack:
    """Environments that say what they said in another run; where that is not known, those of this one do."""

    def __init__(self, environments: Environments, run_dir: Path) -> None:
        """Play back what is in the folder of `run_dir`; `environments` are asked where it ends."""
        self._environments, self._folder = environments, run_dir / CONVERSATIONS_FOLDER
        self._answers: dict[str, dict[Key, Answer]] = {}

    def ask(self, call: Call, answered: Answered) -> None:
        """See `Environments`; an answer that is known comes before this returns."""
        name = _file_name(call.key.group)
        if name not in self._answers:
            path = self._folder / name
            rows = read_json_lines(path) if path.is_file() else []
            self._answers[name] = dict(map(_answer, rows))
        known = self._answers[name].get(call.key)
        if known is None:
            self._environments.ask(call, answered)
        else:
            answered(known)

    def check(self) -> None:
        self._environments.check()

    def take_metrics(self) -> dict[str, float]:
        return self._environments.take_metrics()


def _file_name(group: str) -> str:
    """Name of the file of a group: that of its step, or one for all benchmarks."""
    step = group.partition("/")[0]
    return f"step_{int(step):06d}.jsonl" if step.isdecimal() else "evaluation.jsonl"


def _row(key: Key, answer: Answer) -> dict[str, Any]:
    return {"group": key.group, "sample": key.sample, "turn": key.turn, **answer.row()}


def _answer(row: dict[str, Any]) -> tuple[Key, Answer]:
    return Key(row["group"], row["sample"], row["turn"]), Answer.of_row(row)
