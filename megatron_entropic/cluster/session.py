"""The Ray session of one run: a private local one on loopback, or a running cluster that is joined."""

from __future__ import annotations

import logging
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import ray
from ray.exceptions import GetTimeoutError

from megatron_entropic.cluster.environment import is_prepared
from megatron_entropic.cluster.ray_errors import LOST, translated
from megatron_entropic.cluster.session_folder import session_folder, short_paths
from megatron_entropic.config.run import ClusterConfig, Device
from megatron_entropic.errors import RunError

POLL_S = 0.5
QUICK_S = 10.0
"""A start of Ray that fails sooner was not slow, but impossible."""
QUICK_RETRIES = 2
END_S = 10.0
MESSAGE_CHARACTERS = 600


@contextmanager
def ray_session(config: ClusterConfig, *, local_cpus: int) -> Iterator[Device]:
    """Start or join Ray for the duration of the block; yields the device kind, "cpu" or "cuda".

    Args:
        config: where to find Ray and which device to use.
        local_cpus: logical CPUs a local session offers, one for each actor.

    Raises:
        RunError: no cluster at the address, nodes of `config.nodes` that did not join it, or the device asked for is
            not there.
    """
    if ray.is_initialized():
        raise RunError("Ray is already initialised in this process; a run needs a session of its own")
    with ExitStack() as opened:
        opened.callback(ray.shutdown)
        if config.address == "local":
            folder = opened.enter_context(session_folder())
            opened.callback(ray.shutdown)  # before its folder goes
            _start_local(config, local_cpus, folder)
        else:
            _join(config)
        try:
            yield _device(config)
        except (*LOST, GetTimeoutError) as error:  # of what the driver itself asks of Ray; calls of peers say more
            raise translated(error, "the driver", "Ray") from error


def _start_local(config: ClusterConfig, cpus: int, folder: Path) -> None:
    if not is_prepared():
        raise RunError("call cluster.environment.prepare_ray_environment before ray is imported")
    deadline = time.monotonic() + config.startup_timeout_s
    quick_failures = 0
    while True:
        began = time.monotonic()
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder / "ray"),
                runtime_env={"env_vars": short_paths(folder), **_interpreter()},
            )
            return
        except Exception as error:
            # Ray gives its own servers 30 s, which a machine busy with other work can exceed, and raises a bare
            # Exception then. Another attempt is worth it as long as the run's own limit lasts. What fails at once
            # fails again: a second and third attempt are for ports that another process took.
            ray.shutdown()
            _end_servers(folder)
            quick_failures += time.monotonic() - began < QUICK_S
            if quick_failures > QUICK_RETRIES or time.monotonic() > deadline:
                raise RunError(f"ray start: Ray did not come up on this machine: {_reason(error)}") from error


def _end_servers(folder: Path) -> None:
    """End what a failed start left: Ray knows its servers only when all of them are up."""
    servers = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if str(folder) in " ".join(process.cmdline()):
                process.kill()
                servers.append(process)
    psutil.wait_procs(servers, timeout=END_S)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:MESSAGE_CHARACTERS]


def _interpreter() -> dict[str, str]:
    """Ray 2.60 starts workers by a shell in which it quotes everything but the interpreter: for paths with blanks."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def _join(config: ClusterConfig) -> None:
    deadline = time.monotonic() + config.startup_timeout_s
    if ":" in config.address:
        _await_head(config.address, deadline)
    try:
        ray.init(
            address=config.address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=_interpreter() or None
        )
    except ConnectionError as error:
        raise RunError(
            f"no Ray cluster at cluster.address={config.address} ({error}); start one, or use cluster.address=local"
        ) from error
    _await_nodes(config.nodes, deadline)


def _await_head(address: str, deadline: float) -> None:
    """Wait until something listens there: launchers start Ray and the driver at the same time."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(f"ray join: nothing answers at cluster.address={address}: {error}") from error
        time.sleep(POLL_S)


def _await_nodes(expected: list[str], deadline: float) -> None:
    while missing := set(expected) - _alive_nodes():
        if time.monotonic() > deadline:
            raise RunError(
                f"ray join: {len(missing)} of {len(expected)} nodes did not join within cluster.startup_timeout_s: "
                f"{', '.join(sorted(missing))}"
            )
        time.sleep(POLL_S)


def _alive_nodes() -> set[str]:
    """Every name by which a living node of the cluster goes."""
    names = ("NodeName", "NodeManagerHostname", "NodeManagerAddress")
    return {node[name] for node in ray.nodes() if node["Alive"] for name in names}


def _device(config: ClusterConfig) -> Device:
    gpus = ray.cluster_resources().get("GPU", 0)
    if config.device == "cuda" and not gpus:
        raise RunError("cluster.device=cuda, but the Ray cluster has no GPU")
    return "cuda" if gpus and config.device != "cpu" else "cpu"
