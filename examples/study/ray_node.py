"""One Ray node that all runs of a pool join, so that none has to start and end Ray by itself.

Measured on two busy cores: a run of six steps took 108 s from its start to its end with a node to join, 159 s without.
The node listens on loopback and asks for a token that only the processes of this study have.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import end

LOOPBACK = "127.0.0.1"
ACTORS_OF_A_RUN = 4
"""Room for so many policy ranks and engines in each run."""
END_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RayNode:
    """How a run joins."""

    address: str
    environment: dict[str, str]


@contextmanager
def ray_node(processes: int) -> Iterator[RayNode]:
    """A node with room for so many runs at a time, until the end of the block."""
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Every server binds to loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Workers are started when a run asks for them; otherwise one for each CPU comes first.
        "RAY_prestart_worker_first_driver": "0",
    }
    # Ray's sockets lie below this folder and their paths are limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="me-ray-"))
    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
        *(f"--node-ip-address={LOOPBACK}", f"--port={port}", f"--num-cpus={ACTORS_OF_A_RUN * processes}"),
        *("--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"),
    ]
    with (folder / "node.log").open("w", encoding="utf-8") as log:
        # A session of its own: it must outlive the runs when a Ctrl-C of the terminal ends the study.
        node = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield RayNode(f"{LOOPBACK}:{port}", environment)
    finally:
        end(node, END_TIMEOUT_S)
        shutil.rmtree(folder, ignore_errors=True)
