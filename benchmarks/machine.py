"""What the machine has."""

from __future__ import annotations

from pathlib import Path


def available_bytes() -> int:
    """Memory that new processes can use without swapping (Linux counts it in units of 1024 bytes)."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def cpu_model() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
