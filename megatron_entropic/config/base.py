"""Base class and types of values that all sections of the configuration share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

LARGEST = 2**32 - 1
"""Largest number that a configuration may hold: none means anything beyond. Keys with less room say so themselves."""


def off_is_a_word(value: Any) -> Any:
    """Turn False into the text "off": YAML 1.1 reads a bare `off` as False, and a user who writes it means the word."""
    return "off" if value is False else value


def one_is_a_list(value: Any) -> Any:
    """Turn a single path into a list of one, where a list of paths is expected."""
    return [value] if isinstance(value, str | Path) else value


def _count(value: Any) -> Any:
    """Turn a text such as 1e6 into an integer: a float to Python, and a number of steps to the person who writes it."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else value


Count = Annotated[int, BeforeValidator(_count)]
"""A number of steps, tokens or sequences, which may be written 1e6."""
Seconds = Annotated[float, Field(gt=0, le=2_000_000)]
"""A time limit in seconds; at most 23 days, beyond which milliseconds do not fit the 32 bits that system calls have."""
Ranks = Annotated[int, Field(ge=1, le=16384)]
"""A number of processes or devices."""


def one_line(value: str) -> str:
    """Refuse a name for titles and tables that holds anything that moves a cursor."""
    if not value.isprintable():
        raise ValueError(f"{_short(value)} holds a character that cannot be printed")
    return value


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are finite and checked when assigned."""

    model_config = ConfigDict(extra="forbid", validate_default=True, validate_assignment=True, allow_inf_nan=False)

    short: ClassVar[str | None] = None
    """Key that a text in place of the whole section stands for; None: the section takes none."""

    @field_validator("*")
    @classmethod
    def _can_be_used(cls, value: Any) -> Any:
        """Refuse numbers beyond all sense, and texts that neither a file nor a system call takes."""
        for part in _parts(value):
            if isinstance(part, int | float) and abs(part) > LARGEST:
                raise ValueError(f"{part:g} is beyond all sense: at most {LARGEST:,}")
            if isinstance(part, str | Path):
                _check_text(str(part))
        return value


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, dict):
        yield from _parts([*value, *value.values()])
    else:
        yield value


def _check_text(text: str) -> None:
    if "\0" in text:
        raise ValueError(f"{_short(text)} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{_short(text)} is not valid Unicode: half a character at position {error.start}") from error


def _short(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a configuration."""

    keys: tuple[str, ...]
    """Dotted keys that the verdict was drawn from."""
    message: str
