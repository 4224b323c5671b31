"""Answers of a judge on disk, one for each question, shared by all verifier processes of a run.

The first answer to a question is the answer: whoever asked at the same time gets it too. So equal responses are judged
alike, and a step that is done again after a restart has the rewards it had.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_entropic.errors import RunError

_SELECT = "SELECT text, prompt, completion FROM answers WHERE key = ?"
_TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, prompt INTEGER NOT NULL, completion "
    "INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS spent (tokens INTEGER NOT NULL)",
    "INSERT INTO spent SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM spent)",
)
BUSY_TIMEOUT_S = 30.0
"""Longest wait for another process that writes; a write takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge said, and what it cost."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


def question_key(question: Any) -> str:
    """SHA-256 of everything that an answer depends on, a JSON value."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """Answers by key in one SQLite file, or in memory; safe with several threads and processes of one machine.

    Args:
        path: the file, made when there is something to write; None: answers end with the process.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def get(self, key: str) -> Answer | None:
        """The answer to a question that was asked before, in whatever process.

        Raises:
            RunError: the file cannot be read.
        """
        if self._connection is None and self._path is not None and not self._path.exists():
            return None
        with self._transaction() as connection:
            row = connection.execute(_SELECT, (key,)).fetchone()
        return None if row is None else Answer(*row)

    def keep(self, answers: Mapping[str, Answer]) -> dict[str, Answer]:
        """Keep answers by key, unless there are some already; returns those that are kept.

        Raises:
            RunError: the file cannot be written.
        """
        if not answers:
            return {}
        rows = [(key, answer.text, answer.prompt_tokens, answer.completion_tokens) for key, answer in answers.items()]
        tokens = sum(answer.prompt_tokens + answer.completion_tokens for answer in answers.values())
        # One transaction for a batch: each waits for the disk.
        with self._transaction() as connection:
            connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", rows)
            connection.execute("UPDATE spent SET tokens = tokens + ?", (tokens,))
            return {key: Answer(*connection.execute(_SELECT, (key,)).fetchone()) for key in answers}

    def tokens_spent(self) -> int:
        """Number of tokens of all questions and answers so far, of those too that came second.

        Raises:
            RunError: the file cannot be read.
        """
        if self._connection is None and self._path is not None and not self._path.exists():
            return 0
        with self._transaction() as connection:
            return int(connection.execute("SELECT tokens FROM spent").fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection = self._connection or self._open()
                with self._connection:
                    yield self._connection
            except (sqlite3.Error, OSError) as error:
                raise RunError(
                    f"the judge's answers in {self._path} cannot be used: {error}; make room, or move the file away to "
                    "ask everything anew"
                ) from error

    def _open(self) -> sqlite3.Connection:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path or ":memory:", timeout=BUSY_TIMEOUT_S, check_same_thread=False)
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _TABLES:
                connection.execute(statement)
        return connection
