"""What all sections of the configuration share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


def off_is_a_word(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as False; a user who writes it means the word."""
    return "off" if value is False else value


def one_is_a_list(value: Any) -> Any:
    """A single path may stand where a list of paths is expected."""
    return [value] if isinstance(value, str | Path) else value


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are checked when assigned."""

    model_config = ConfigDict(extra="forbid", validate_default=True, validate_assignment=True)
