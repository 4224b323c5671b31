"""The Ray session of one run: a private local one on loopback, or a running cluster that is joined."""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError

from megatron_entropic.cluster.environment import is_prepared
from megatron_entropic.cluster.nodes import node_table
from megatron_entropic.cluster.waiting import LOST, translated
from megatron_entropic.config.run import ClusterConfig, Device
from megatron_entropic.errors import RunError, UserError

POLL_S = 0.5
SPARE_JOIN_S = 30.0
"""Seconds that a start waits for spare nodes, when all others have joined."""
REJOIN_S = 60.0
"""Seconds that a run without enough nodes waits for lost ones: where Ray alone was lost, it joins again by itself."""
QUICK_S = 10.0
"""Seconds within which a failed start of Ray was not slow, but impossible."""
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
        opened.enter_context(_short_messages())
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


@contextmanager
def _short_messages() -> Iterator[None]:
    """Shorten reports of Ray's servers, such as a full disk, to one line each: the run's own error says what they mean.

    Ray 2.60 prints it whatever `log_to_driver` is, tracebacks included, and for every object anew.
    """
    worker = ray._private.worker
    plain, told = worker.print_to_stdstream, set[str]()

    def shorten(data: dict[str, Any], **_: Any) -> None:
        for line in filter(None, map(_gist, data["lines"])):
            if line not in told:
                told.add(line)
                sys.stderr.write(f"Ray's {data['pid']}: {line}\n")

    worker.print_to_stdstream = shorten
    try:
        yield
    finally:
        worker.print_to_stdstream = plain


def _gist(message: str) -> str:
    """Its first line, of a traceback the last."""
    lines = message.strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith("Traceback") else 0][:MESSAGE_CHARACTERS]


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
    """End the servers that a failed start left: Ray knows its servers only when all of them are up."""
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
    """Setting of Ray's runtime environment that quotes the interpreter's path, if it needs quotes."""
    # Ray 2.60 starts workers by a shell in which it quotes everything but the interpreter: for paths with blanks.
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
    _await_nodes(config, deadline)


def _await_head(address: str, deadline: float) -> None:
    """Wait until something listens at the head's address: launchers start Ray and the driver at the same time."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(f"ray join: nothing answers at cluster.address={address}: {error}") from error
        time.sleep(POLL_S)


def _await_nodes(cluster: ClusterConfig, deadline: float) -> None:
    """Wait for the nodes of `cluster.nodes`: all of them, or as many as the run works on where others do not come.

    Raises:
        RunError: fewer came.
    """
    began, spare = time.monotonic(), cluster.spare_nodes
    while missing := (table := node_table()).missing(cluster.nodes):
        lost = {name for node in table.gone for name in node.names}
        late = [name for name in missing if name not in lost]
        waited_s = time.monotonic() - began
        if len(missing) <= spare and (not late or waited_s > SPARE_JOIN_S):
            return
        if spare and not late and waited_s > REJOIN_S:
            raise RunError(
                f"ray join: no spare node is left: {len(missing)} of {len(cluster.nodes)} nodes are gone and did not "
                f"come back within {REJOIN_S:g} s, {spare} were spare: {', '.join(missing)}"
            )
        if time.monotonic() > deadline:
            raise RunError(
                f"ray join: {len(missing)} of {len(cluster.nodes)} nodes did not join within "
                f"cluster.startup_timeout_s: {', '.join(sorted(missing))}"
            )
        time.sleep(POLL_S)


def _device(config: ClusterConfig) -> Device:
    gpus = ray.cluster_resources().get("GPU", 0)
    if config.device == "cuda" and not gpus:
        raise RunError("cluster.device=cuda, but the Ray cluster has no GPU")
    return "cuda" if gpus and config.device != "cpu" else "cpu"


# The folder of a private Ray session: nobody else gets into it, its path is short, and it does not outlive the run.
#
#   | /tmp/me-ray-abcd1234/      0700, ours
#   |     owner                  locked while the run lives
#   |     ray/                   Ray's: it makes every folder of its own writable for everybody
#
# A run that is killed cannot remove its folder. The next one of the same user does, once nothing works in it any more.

PREFIX = "me-ray-"
OWNER = "owner"
SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket, in bytes."""
_LONGEST_SOCKET = "/ray/session_2026-11-28_07-03-38_062837_4194304/sockets/plasma_store"
_RANDOM = "abcd1234"  # as many letters as `tempfile.mkdtemp` takes
_LONGEST_BASE_BYTES = SOCKET_PATH_BYTES - len(f"/{PREFIX}{_RANDOM}{_LONGEST_SOCKET}")


@contextmanager
def session_folder() -> Iterator[Path]:
    """Make a new folder for the duration of the block; what killed runs left behind is removed first.

    Raises:
        UserError: no folder for temporary files has a path short enough for Ray's sockets.
    """
    base = _short_base([Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")])
    remove_abandoned(base)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    # The lock goes with the process, however that ends. Ray's processes do not inherit it.
    with (folder / OWNER).open("w", encoding="ascii") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def short_paths(folder: Path) -> dict[str, str]:
    """Environment variables that keep other sockets of the run's processes within their limit, too.

    vLLM's lie where VLLM_RPC_BASE_PATH says, those of Python's multiprocessing in TMPDIR, which is left alone unless it
    is too long.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_BASE_BYTES:
        return {"VLLM_RPC_BASE_PATH": str(folder)}
    return {"VLLM_RPC_BASE_PATH": str(folder), "TMPDIR": str(folder)}


def remove_abandoned(base: Path) -> list[Path]:
    """Remove the folders of this user's killed runs below `base`; returns them.

    A folder stays while its run lives, and while a process names it in its command line: Ray's own may still be ending.
    """
    abandoned = [folder for folder in base.glob(f"{PREFIX}*") if _is_abandoned(folder)]
    if abandoned:
        commands = _commands()
        abandoned = [folder for folder in abandoned if not any(os.fsencode(folder) in command for command in commands)]
    for folder in abandoned:
        shutil.rmtree(folder, ignore_errors=True)
    return abandoned


def _is_abandoned(folder: Path) -> bool:
    if folder.is_symlink() or folder.lstat().st_uid != os.getuid():
        return False
    try:
        with (folder / OWNER).open("r+", encoding="ascii") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked by a run; or not there (yet): a run that begins, or somebody else's folder
        return False
    return True


def _commands() -> list[bytes]:
    """Command lines of all processes that can be seen."""
    commands = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(process.read_bytes())
        except OSError:  # it has ended meanwhile, or is hidden
            continue
    return commands


def _short_base(candidates: list[Path]) -> Path:
    for base in candidates:
        if len(os.fsencode(base)) <= _LONGEST_BASE_BYTES and os.access(base, os.W_OK | os.X_OK):
            return base
    listed = ", ".join(map(str, candidates))
    raise UserError(
        f"no folder for the sockets of the run's processes: of {listed} none can be written to and has a path of at "
        f"most {_LONGEST_BASE_BYTES} bytes; set TMPDIR to one that does"
    )
