"""The look at every node before a job: strangers on its port, typed GPUs, drivers and compilers."""

from __future__ import annotations

import re
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_entropic.cluster.preflight import (
    MeetingPlace,
    NodeReport,
    Requirements,
    collect_reports,
    gpu_count,
    look_at_this_node,
    problems,
    report_to,
    requirements,
)
from megatron_entropic.config.run import Config
from megatron_entropic.errors import RunError

GPU = ("NVIDIA H100 80GB HBM3", 81000, 81559)


@pytest.fixture
def place(tmp_path: Path) -> MeetingPlace:
    token = tmp_path / "token"
    token.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return MeetingPlace("127.0.0.1", port, timeout_s=60, token_file=token)


def connect(place: MeetingPlace) -> socket.socket:
    """As soon as somebody listens there."""
    while True:
        try:
            return socket.create_connection((place.host, place.port), timeout=5)
        except ConnectionRefusedError:
            time.sleep(0.01)


def test_strangers_on_the_port_neither_end_the_preflight_nor_fill_its_memory(
    place: MeetingPlace, tmp_path: Path
) -> None:
    required = Requirements(["a", "b"], gpus_per_node=0, paths=[tmp_path])
    with ThreadPoolExecutor() as beside:
        collecting = beside.submit(collect_reports, place, required)
        silent = [connect(place) for _ in range(100)]
        with connect(place) as reset:
            reset.sendall(b"s")
            reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with connect(place) as deep:
            deep.sendall(b"secret\n" + b"[" * 200_000)
        with connect(place) as foreign:
            foreign.sendall(b'other\n{"node": "b"}')
        for endless in (b"x" * 2**20, b"secret\n" + b"x" * 2**20):
            # It is cut off, and not after 64 MiB.
            with connect(place) as flood, pytest.raises(OSError):
                flood.sendall(endless * 64)
        report_to(place, "b", required.paths)
        reports = collecting.result(timeout=30)
    for connection in silent:
        connection.close()
    assert [report.node for report in reports] == ["a", "b"]
    assert problems(reports, required) == []


def test_a_node_that_reports_to_somebody_else_says_so(place: MeetingPlace, tmp_path: Path) -> None:
    with (
        socket.create_server((place.host, place.port)),
        pytest.raises(RunError, match=r"b cannot reach .* set ME_PORT"),
    ):
        report_to(replace(place, timeout_s=0.5), "b", [tmp_path])


@pytest.mark.parametrize(
    ("words", "count"),
    [("8", 8), ("h100:8", 8), ("gpu:8", 8), ("gpu:h100:4,gpu:a100:2", 6), ("gpu:h100:8(S:0-1)", 8), ("0", 0)],
)
def test_gpus_are_counted_as_slurm_says_them(words: str, count: int) -> None:
    assert gpu_count(words) == count


@pytest.fixture
def report(tmp_path: Path) -> NodeReport:
    seen = look_at_this_node("a", [tmp_path])
    versions = seen.versions | {"cuda": "13.0.96"}
    return replace(seen, gpus=[GPU], missing_tools=[], versions=versions, driver="580.65.06", driver_cuda=13)


def test_a_driver_older_than_the_packages_is_refused(report: NodeReport) -> None:
    required = Requirements(["a"], gpus_per_node=1, paths=[])
    assert problems([report], required) == []
    old = replace(report, driver="550.54.15", driver_cuda=12)
    assert problems([old], required) == [
        "a: driver 550.54.15 serves CUDA 12, but the installed packages are built for CUDA 13: it needs driver 580 or "
        "newer, or NVIDIA's cuda-compat"
    ]
    assert problems([old], replace(required, gpus_per_node=0)) == [], "a run on CPUs does not care"


def test_a_node_without_compiler_or_headers_is_refused_where_kernels_are_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: NodeReport
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    bare = replace(report, missing_tools=look_at_this_node("a", []).missing_tools)
    found = problems([bare], Requirements(["a"], gpus_per_node=1, paths=[]))
    assert [line.split(",")[0] for line in found] == ["a: no C compiler (gcc or clang", f"a: no {tmp_path}/Python.h"]
    assert problems([bare], Requirements(["a"], gpus_per_node=0, paths=[])) == []


def test_gpus_and_what_their_driver_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: NodeReport) -> None:
    smi = tmp_path / "nvidia-smi"
    line = "echo NVIDIA H100 80GB HBM3, 79000, 81559, 580.95.05"
    smi.write_text(f"#!/bin/sh\n{line}\n{line}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def library(version: int) -> Any:
        def ask(place: Any) -> int:
            place._obj.value = version
            return 0

        return lambda name: SimpleNamespace(cuDriverGetVersion=ask)

    # What a run would load, such as cuda-compat, may serve more than the driver that nvidia-smi names.
    monkeypatch.setattr("ctypes.CDLL", library(13020))
    seen = look_at_this_node("a", [])
    assert seen.gpus == [("NVIDIA H100 80GB HBM3", 79000, 81559)] * 2
    assert (seen.driver, seen.driver_cuda) == ("580.95.05", 13)
    (missing,) = problems([replace(report, gpus=seen.gpus)], Requirements(["a"], gpus_per_node=8, paths=[]))
    assert missing == "a: 2 GPUs, 8 are needed"


def test_a_node_whose_limit_of_open_files_is_below_what_the_run_opens_is_refused(report: NodeReport) -> None:
    """A rank holds a socket to each other one in each gloo group: at 1,024 ranks a limit of 1,024 ended the start."""
    config = Config.model_validate(
        {"model": {"hf_dir": "m"}, "data": {"train_files": ["d"]}, "policy": {"data_parallel": 1024}}
    )
    required = replace(requirements(config, ["a"], 0), paths=[])
    assert required.open_files > 10 * 1024
    (found,) = problems([replace(report, open_files=1024)], required)
    assert re.search(r"a: the hard limit of open files \(ulimit -Hn\) is 1,024, and 10,\d{3} are needed", found)
    assert problems([replace(report, open_files=2**20)], required) == []
