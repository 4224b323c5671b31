"""The kernels compiled for sm_90 as the backend launches them, on a machine without a GPU: registers and accesses.

A driver that only names the target stands in for the GPU's, and every launch ends after compilation.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver

from megatron_entropic.tensor_parallel.statistics import GradientInputs, Merged
from megatron_entropic.tensor_parallel.triton_backend import COLUMNS_OF_WARP, DEPTH, TritonBackend

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BACKEND = TritonBackend()
REGISTERS = 65536
"""Of a multiprocessor of sm_90."""

Compiled = Any
Launch = Callable[[Tensor], None]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Compiled]:
    """What the backend has launched in this test, compiled for sm_90.

    The stand-in's device has a number that no GPU has, because Triton keeps compiled kernels by device.
    """
    target = GPUTarget("cuda", 90, 32)
    stand_in = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 1000, get_current_stream=lambda device: 0
    )
    monkeypatch.setattr(driver, "_active", stand_in)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    kernels: list[Compiled] = []
    run = triton.runtime.JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(kernel, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(triton.runtime.JITFunction, "run", compile_only)
    return kernels


def launch_statistics(x: Tensor, *, pieces: int = 1, need_entropy: bool = True) -> None:
    column, inverse = torch.zeros(len(x), dtype=torch.int64), torch.ones(len(x))
    out = torch.empty(pieces * (3 if need_entropy else 2) + 1, len(x))
    BACKEND.statistics(x, column, inverse, valid=max(x.shape[1] - 3, 1), pieces=pieces, out=out)


def launch_gradient(x: Tensor, out: Tensor, *, entropy_gradient: bool = True) -> None:
    column, v = torch.zeros(len(x), dtype=torch.int64), torch.ones(len(x))
    h = v if entropy_gradient else None
    inputs = GradientInputs(column, v, Merged(v, v, v, v), v, h)
    BACKEND.gradient(x, inputs, valid=max(x.shape[1] - 3, 1), out=out)


def tool(*command: str | Path) -> str:
    """What a tool of the toolchain says; one that fails is a failing test."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def accesses(kernel: Compiled, tmp_path: Path) -> Counter[str]:
    """Loads from and stores to global memory in the machine code, by width: `LDG.128` is 16 bytes a thread."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    code = tool(TOOLS / "cuobjdump", "-sass", path)
    found = re.findall(r"\b(LDG|STG)\.E\b(?:\.[US]?(8|16|64|128)\b)?", code)
    return Counter(f"{kind}.{width or 32}" for kind, width in found)


def assembler_report(kernel: Compiled, tmp_path: Path) -> dict[str, int]:
    """Registers of a thread, and bytes that it keeps in memory because they found no register."""
    path = tmp_path / "kernel.ptx"
    path.write_text(kernel.asm["ptx"])
    report = tool(get_ptxas(90).path, "-v", "-arch=sm_90a", path, "-o", tmp_path / "assembled.cubin")
    patterns = {
        "registers": r"Used (\d+) registers",
        "stores": r"(\d+) bytes spill stores",
        "stack": r"(\d+) bytes stack",
    }
    return {name: int(re.findall(pattern, report)[0]) for name, pattern in patterns.items()}


def programs_on_a_multiprocessor(kernel: Compiled, report: dict[str, int]) -> int:
    """How many have room in its registers at a time."""
    return REGISTERS // (report["registers"] * 32 * kernel.metadata.num_warps)


STATISTICS: dict[str, Launch] = {
    "with_entropy": launch_statistics,
    "in_pieces": lambda x: launch_statistics(x, pieces=4),
    "without_entropy": lambda x: launch_statistics(x, need_entropy=False),
}
GRADIENT: dict[str, Launch] = {
    "with_entropy": lambda x: launch_gradient(x, x),
    "without_entropy": lambda x: launch_gradient(x, x, entropy_gradient=False),
}
SHARD = 75968
"""Columns of a real vocabulary's half, 151936 / 2; a quarter of it is divisible by 16 as well."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [SHARD, 512])
@pytest.mark.parametrize("variant", STATISTICS)
def test_statistics_read_sixteen_bytes_at_a_time_and_stay_in_registers(
    variant: str, columns: int, dtype: torch.dtype, compiled: list[Compiled], tmp_path: Path
) -> None:
    STATISTICS[variant](torch.empty(8, columns, dtype=dtype))
    (kernel,) = compiled
    found = accesses(kernel, tmp_path)
    assert found.pop("LDG.128") == DEPTH
    assert sum(found[name] for name in found if name.startswith("LDG")) == 3, "temperature, column and target's logit"
    assert sum(found[name] for name in found if name.startswith("STG")) == (3 if variant == "without_entropy" else 4)
    report = assembler_report(kernel, tmp_path)
    assert (report["stores"], report["stack"]) == (0, 0)
    assert programs_on_a_multiprocessor(kernel, report) >= 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [SHARD, 512])
@pytest.mark.parametrize("variant", GRADIENT)
def test_gradient_reads_and_writes_sixteen_bytes_at_a_time_and_stays_in_registers(
    variant: str, columns: int, dtype: torch.dtype, compiled: list[Compiled], tmp_path: Path
) -> None:
    GRADIENT[variant](torch.empty(8, columns, dtype=dtype))
    (kernel,) = compiled
    found = accesses(kernel, tmp_path)
    vectors = COLUMNS_OF_WARP // 32 * dtype.itemsize // 16
    assert found.pop("LDG.128") == vectors
    assert found.pop("STG.128") == vectors
    assert all(name.startswith("LDG") for name in found)
    assert sum(found.values()) == (7 if variant == "with_entropy" else 5), "one number of each vector [T]"
    report = assembler_report(kernel, tmp_path)
    assert (report["stores"], report["stack"]) == (0, 0)
    assert programs_on_a_multiprocessor(kernel, report) >= 5


def test_gradient_is_rounded_to_the_nearest_bfloat16(compiled: list[Compiled]) -> None:
    """The interpreter cuts digits off, so only the compiled code can tell."""
    launch_gradient(torch.empty(8, SHARD), torch.empty(8, SHARD, dtype=torch.bfloat16))
    conversions = re.findall(r"cvt\.\w+\.bf16\w*\.f32", compiled[0].asm["ptx"])
    assert conversions
    assert all(conversion.startswith("cvt.rn.") for conversion in conversions)


@pytest.mark.parametrize("launch", [launch_statistics, lambda x: launch_gradient(x, x)], ids=["statistics", "gradient"])
@pytest.mark.parametrize(
    "x",
    [
        torch.empty(8, SHARD + 1),
        torch.empty(8, SHARD + 1)[:, :SHARD],
        torch.empty(8 * SHARD + 1)[1:].view(8, SHARD),
    ],
    ids=["odd_width", "odd_stride", "unaligned"],
)
def test_what_is_not_aligned_is_not_read_as_if_it_were(
    x: Tensor, launch: Launch, compiled: list[Compiled], tmp_path: Path
) -> None:
    """A wide access to such an address would be a fault on a GPU. It also shows that the tests above can fail."""
    launch(x)
    found = accesses(compiled[0], tmp_path)
    assert found["LDG.32"] > 7
    assert found["LDG.128"] == found["STG.128"] == 0


def test_one_token_and_one_column_compile(compiled: list[Compiled]) -> None:
    """Triton replaces arguments that are 1 by constants, of another type than a variable."""
    x = torch.empty(1, 1)
    launch_statistics(x, pieces=4)
    launch_gradient(x, x)
    assert len(compiled) == 2
