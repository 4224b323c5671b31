"""Types of numbers on the command line: a number of no use is the option's error, before anything is read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

_MOST = 10**15
"""Largest number of an option: beyond it numbers overflow in the arithmetic of sizes and times."""


def whole(least: int) -> Callable[[str], int]:
    """Function for argparse's `type`: an integer of at least `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = _MOST + 1
        if not least <= value <= _MOST:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, found {text!r}")
        return value

    return read


def number(*, above: float | None = None, least: float | None = None, most: float = _MOST) -> Callable[[str], float]:
    """Function for argparse's `type`: a finite number within limits; `above` itself is out, the others are in."""
    words = [f"above {above:g}"] if above is not None else []
    words += [f"of at least {least:g}"] if least is not None else []
    words += [f"of at most {most:g}"] if most != _MOST else []

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low = (above is None or value > above) and (least is None or value >= least)
        if not (low and math.isfinite(value) and value <= most):
            raise argparse.ArgumentTypeError(f"expected a number {' and '.join(words)}".rstrip() + f", found {text!r}")
        return value

    return read
