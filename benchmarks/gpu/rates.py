"""What a device reaches at best: copying within its memory, and multiplying bfloat16 matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.measure import Stopwatch

WARM_UP = 3
"""Repetitions that are not timed."""


def copy_rate(size: int, device: torch.device, repetitions: int) -> float:
    """Bytes read plus written per second when `size` bytes are copied within the device's memory."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device, repetitions)


def product_rate(size: int, device: torch.device, repetitions: int) -> float:
    """Floating point operations per second of a product of two bfloat16 matrices [size, size]."""
    a, b = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    out = torch.empty_like(a)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device, repetitions)


def seconds(work: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    """Wall time of each of so many repetitions; on a GPU its own time."""
    taken = []
    for _ in range(repetitions):
        watch = Stopwatch(device)
        watch.mark()
        work()
        watch.mark()
        taken.append(watch.since_first()[0].wall)
    return taken


def _best_seconds(work: Callable[[], object], device: torch.device, repetitions: int) -> float:
    for _ in range(WARM_UP):
        work()
    return min(seconds(work, device, repetitions))
