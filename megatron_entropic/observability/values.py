"""Values of files that people may have edited: looked up and taken as numbers, whatever stands there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

Default = TypeVar("Default")
_LARGEST = 1e100
"""Largest number that is taken: axes are computed with products of values, which must stay finite."""


def setting_of(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A value of a configuration by its dotted key; the default where there is none, or null."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return default if value is None else value


def as_number(value: Any, default: Default) -> float | Default:
    """A value of a file as a number; the default where it is text, not finite, or beyond all figures."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return default
    try:
        number = float(value)
    except OverflowError:
        return default
    return number if abs(number) <= _LARGEST else default
