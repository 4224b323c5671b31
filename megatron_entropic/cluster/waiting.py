"""Waiting for remote calls with a name and a limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from megatron_entropic.errors import PeerDied, PhaseTimeout, RunError

POLL_S = 1.0
GRACE_S = 3.0
"""When a peer's call fails, another peer's death may be the cause, and may become known so much later."""


def gather(
    calls: Mapping[str, ray.ObjectRef],
    *,
    phase: str,
    timeout_s: float,
    while_waiting: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Results of remote calls by peer name.

    Fails on the first peer that fails, without waiting for the others: when one rank is gone, the rest sit in a
    collective until its own timeout.

    Args:
        calls: peer name ("policy rank 3") -> object reference.
        phase: what the run is doing, for messages.
        timeout_s: limit of the whole wait, seconds.
        while_waiting: called about once a second; what it raises ends the wait.

    Raises:
        PhaseTimeout: naming the peers that did not answer in time.
        PeerDied: a peer's process is gone.
        RunError: a peer raised and none died; the message carries its error, the cause its traceback.
    """
    deadline = time.monotonic() + timeout_s
    peer_of = {reference: peer for peer, reference in calls.items()}
    pending = list(peer_of)
    results: dict[str, Any] = {}
    while pending:
        left_s = max(0.0, deadline - time.monotonic())
        ready, pending = ray.wait(pending, num_returns=1, timeout=min(POLL_S, left_s))
        if not ready and left_s > POLL_S:
            while_waiting()
            continue
        if not ready:
            missing = ", ".join(sorted(peer_of[reference] for reference in pending))
            raise PhaseTimeout(f"{phase}: no answer within {timeout_s:g} s from {missing}")
        try:
            results[peer_of[ready[0]]] = _result(ready[0], peer_of[ready[0]], phase)
        except PeerDied:
            raise
        except RunError:
            _look_for_deaths({reference: peer_of[reference] for reference in pending}, phase)
            raise
    return {peer: results[peer] for peer in calls}


def _look_for_deaths(pending: dict[ray.ObjectRef, str], phase: str) -> None:
    """A rank whose neighbour dies fails in a collective, often before the death itself is known."""
    deadline = time.monotonic() + GRACE_S
    waiting = list(pending)
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=left_s)
        for reference in ready:
            try:
                _result(reference, pending[reference], phase)
            except PeerDied:
                raise
            except RunError:
                continue


def _result(reference: ray.ObjectRef, peer: str, phase: str) -> Any:
    try:
        return ray.get(reference, timeout=60)
    except RayActorError as error:
        raise PeerDied(f"{phase}: the process of {peer} died ({_first_line(error)})") from error
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        raise RunError(f"{phase}: {peer}: {type(cause).__name__}: {cause}") from error
    except GetTimeoutError as error:
        raise PhaseTimeout(f"{phase}: the answer of {peer} is ready but could not be fetched within 60 s") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
