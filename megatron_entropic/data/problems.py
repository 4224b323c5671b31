"""What is wrong with a data set, collected to be told in one message."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_entropic.errors import UserError

_SHOWN = 10


@dataclass(slots=True)
class Row:
    """One row and where it stands, for messages."""

    file: Path
    number: int
    """Row of the file from 0 (parquet, Arrow), or line or item from 1 (JSON)."""
    values: dict[str, Any]
    unit: str = "row"

    @property
    def place(self) -> str:
        """`train.parquet, row 17`."""
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(slots=True)
class Problems:
    """Files that cannot be read at all, and rows that cannot be used, the latter grouped by reason."""

    messages: list[str] = field(default_factory=list)
    _rows: dict[tuple[Path, str, str], list[tuple[int, str]]] = field(default_factory=dict)

    def add(self, message: str) -> None:
        """Note something that no row can be blamed for."""
        self.messages.append(message)

    def add_row(self, row: Row, reason: str, detail: str = "") -> None:
        """Note a row; `detail` is what differs between rows with the same reason."""
        self._rows.setdefault((row.file, row.unit, reason), []).append((row.number, detail))

    @property
    def row_count(self) -> int:
        """Number of findings about rows; a row may have several."""
        return sum(map(len, self._rows.values()))

    def row_lines(self, shown: int = _SHOWN) -> list[str]:
        """One line for each file and reason, with the numbers of the first rows."""
        return [_line(file, unit, reason, found, shown) for (file, unit, reason), found in self._rows.items()]

    def raise_if_any(self, what: str, *, skip_rows: bool = False) -> None:
        """Raise everything that was noted.

        Args:
            what: first words of the message.
            skip_rows: findings about rows alone are no error.

        Raises:
            UserError: files first, then each reason with its rows.
        """
        if not self.messages and (skip_rows or not self._rows):
            return
        count = len(self.messages) + self.row_count
        shown = [*self.messages[:_SHOWN], *self.row_lines()]
        more = len(self.messages) - _SHOWN
        tail = f"\n  ... and {more} more files or benchmarks" if more > 0 else ""
        raise UserError(f"{what}: {count} problem(s)\n" + "\n".join(f"  - {line}" for line in shown) + tail)


def _line(file: Path, unit: str, reason: str, found: list[tuple[int, str]], shown: int) -> str:
    """`train.parquet: 3 rows: the ground truth is empty: 5, 9, 12`."""
    numbers = [f"{number} ({detail})" if detail else str(number) for number, detail in found[:shown]]
    if len(found) == 1:
        number, detail = found[0]
        return f"{file}, {unit} {number}: {reason}" + (f": {detail}" if detail else "")
    more = f" and {len(found) - shown:,} more" if len(found) > shown else ""
    return f"{file}: {len(found):,} {unit}s: {reason}: {unit}s {', '.join(numbers)}{more}"
