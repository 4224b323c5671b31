"""Noticing that Ray's head process is gone. Calls in flight go on without it, and then wait for ever."""

from __future__ import annotations

import math
import socket
import time

import ray

from megatron_entropic.errors import PeerDied

PROBE_EVERY_S = 2.0
PROBE_TIMEOUT_S = 2.0
GONE_AFTER_S = 10.0
"""Less than the 60 s after which Ray ends the process that lost its head, without a word to the run."""


def head_refusal() -> OSError | None:
    """Why Ray's head takes no connection; None: it does."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        return error
    return None


class HeadWatch:
    """Looks after the head (gcs_server) during one wait: does its port still take connections?"""

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._next_probe = time.monotonic() + PROBE_EVERY_S
        self._silent_since = math.inf

    def check(self) -> None:
        """To be called about once a second.

        Raises:
            PeerDied: it has refused every connection for GONE_AFTER_S.
        """
        now = time.monotonic()
        if now < self._next_probe:
            return
        self._next_probe = now + PROBE_EVERY_S
        error = head_refusal()
        if error is None:
            self._silent_since = math.inf
            return
        self._silent_since = min(self._silent_since, now)
        if now - self._silent_since >= GONE_AFTER_S:
            raise PeerDied(
                f"{self._phase}: Ray's head process, gcs_server, is gone ({error}). Was it ended for want of memory? "
                "`dmesg` of its node says so"
            ) from error
