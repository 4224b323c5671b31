"""Tensors with values that no model can work with: NaN and infinities make every output NaN."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import Tensor

from megatron_entropic.errors import Problems


class UnusableTensors:
    """Names of tensors with NaN or infinite values, collected as they are read, from any thread."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def check(self, name: str, values: Tensor) -> None:
        """Note the tensor if some of these values of it are NaN or infinite."""
        if not values.numel():
            return
        # NaN is the minimum of whatever it is among, and both extremes take a fraction of the time of a comparison.
        if not all(extreme.isfinite() for extreme in torch.aminmax(values)):
            count = int((~values.isfinite()).sum())
            with self._lock:
                self._counts[name] = self._counts.get(name, 0) + count

    def raise_if_any(self, source: Path, consequence: str) -> None:
        """Refuse to go on if tensors with NaN or infinite values were found.

        Raises:
            UserError: names all of them. `consequence` says what therefore was not done.
        """
        problems = Problems()
        for name, count in sorted(self._counts.items()):
            problems.add("tensors with NaN or infinite values", f"{name}: {count:,} values")
        problems.raise_if_any(f"{source}: {consequence}, no model can work with these weights:")
