"""Waiting for remote calls with a name and a limit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from megatron_entropic.errors import PeerDied, PhaseTimeout, RunError


def gather(calls: Mapping[str, ray.ObjectRef], *, phase: str, timeout_s: float) -> dict[str, Any]:
    """Results of remote calls by peer name.

    Fails on the first peer that fails, without waiting for the others: when one rank is gone, the rest sit in a
    collective until its own timeout.

    Args:
        calls: peer name ("policy rank 3") -> object reference.
        phase: what the run is doing, for messages.
        timeout_s: limit of the whole wait, seconds.

    Raises:
        PhaseTimeout: naming the peers that did not answer in time.
        PeerDied: a peer's process is gone.
        RunError: a peer raised; the message carries its error, the cause its traceback.
    """
    deadline = time.monotonic() + timeout_s
    peer_of = {reference: peer for peer, reference in calls.items()}
    pending = list(peer_of)
    results: dict[str, Any] = {}
    while pending:
        ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = ", ".join(sorted(peer_of[reference] for reference in pending))
            raise PhaseTimeout(f"{phase}: no answer within {timeout_s:g} s from {missing}")
        results[peer_of[ready[0]]] = _result(ready[0], peer_of[ready[0]], phase)
    return {peer: results[peer] for peer in calls}


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
