"""Waits for remote calls, each with a name and a limit."""

from __future__ import annotations

import math
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray import ObjectRefGenerator
from ray import exceptions as ray_errors
from ray.exceptions import RayError, RayTaskError

from megatron_entropic.errors import PeerDied, PhaseTimeout, RunError, UserError, explained

POLL_S = 1.0
GRACE_S = 3.0
"""Seconds by which the death of a peer may become known later than the failure of another's call that it caused."""

COLLECTIVE_FAILURES = ("gloo/transport", "[Rank ", "NCCL error", "DistNetworkError")
"""Texts in the messages of torch.distributed when another rank is gone or does not answer."""


def gather(
    calls: Mapping[str, ray.ObjectRef],
    *,
    phase: str,
    timeout_s: float,
    while_waiting: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Wait for the results of remote calls, by peer name.

    Fails within about a second of the first peer that fails, without waiting for the others: when one rank is gone,
    the rest sit in a collective until its own timeout.

    Args:
        calls: peer name ("policy rank 3") -> object reference.
        phase: what the run is doing, for messages.
        timeout_s: limit of the whole wait, seconds.
        while_waiting: called about once a second; what it raises ends the wait.

    Raises:
        PhaseTimeout: naming the peers that did not answer in time.
        PeerDied: a peer's process is gone, or a peer lost another one.
        RunError: a peer raised and none died; the message carries its error, the cause its traceback. PhaseTimeout if
            it waited for another peer in vain.
        UserError: what a peer found is for the person to change.
    """
    pending = {reference: peer for peer, reference in calls.items()}
    results: dict[str, Any] = {}
    head = HeadWatch(phase)

    def watch() -> None:
        head.check()
        while_waiting()

    for reference, peer in _as_they_end(pending, timeout_s, watch):
        try:
            results[peer] = result_of(reference, peer, phase)
        except RunError as error:
            if not _is_death_of_the_peer_itself(error):
                _look_for_deaths(pending, phase)
            raise
    if pending:
        raise _silent(phase, timeout_s, list(pending.values()))
    return {peer: results[peer] for peer in calls}


def receive_streams(
    streams: Mapping[str, ObjectRefGenerator],
    take: Callable[[str, Any], None],
    *,
    phase: str,
    timeout_s: float,
    while_waiting: Callable[[], None] = lambda: None,
) -> dict[str, RunError]:
    """Hand on everything that remote generators yield, as it comes. The loss of one peer does not stop the others.

    Args:
        streams: peer name -> what its generator's `remote` returned.
        take: called with a peer's name and what it yielded.
        phase, timeout_s: as in `gather`.
        while_waiting: called at least about once a second; what it raises ends the wait.

    Returns:
        PeerDied or PhaseTimeout by the name of each peer that is gone or did not come to its end.

    Raises:
        RunError: a peer raised.
    """
    pending = {stream: peer for peer, stream in streams.items()}
    lost: dict[str, RunError] = {}
    deadline = time.monotonic() + timeout_s
    head = HeadWatch(phase)
    while pending and (left_s := deadline - time.monotonic()) > 0:
        head.check()
        while_waiting()
        for stream in all_ready(list(pending), min(POLL_S, left_s)):
            peer, item = pending[stream], next(stream, None)
            if item is None:
                del pending[stream]
                continue
            try:
                take(peer, result_of(item, peer, phase))
            except PeerDied as error:
                if not _is_death_of_the_peer_itself(error):
                    raise
                lost[peer] = error
                del pending[stream]
    return lost | {peer: _silent(phase, timeout_s, [peer]) for peer in pending.values()}


def all_ready(waited_for: list[Any], timeout_s: float) -> list[Any]:
    """Wait until one of some references or streams is ready; returns all that are by then, none after `timeout_s`.

    A call of `ray.wait` looks at each of them: one call for each that is ready takes seconds with a thousand engines.
    """
    ready, rest = ray.wait(waited_for, num_returns=1, timeout=timeout_s)
    if not ready or not rest:
        return list(ready)
    also, _ = ray.wait(rest, num_returns=len(rest), timeout=0)
    return [*ready, *also]


def answered(calls: Mapping[str, ray.ObjectRef]) -> dict[str, Any]:
    """Results, by peer name, of those calls that have ended without an error by now."""
    ready = _ended(calls)
    results = {}
    for peer, reference in calls.items():
        if reference in ready:
            try:
                results[peer] = ray.get(reference, timeout=60)
            except RayError:
                continue
    return results


def dead_peers(pings: Mapping[str, ray.ObjectRef]) -> list[str]:
    """Names of the peers whose process is known to be gone after GRACE_S; those that are busy do not count."""
    ray.wait(list(pings.values()), num_returns=len(pings), timeout=GRACE_S)
    ready = _ended(pings)
    dead = []
    for peer, reference in pings.items():
        if reference in ready:
            try:
                ray.get(reference, timeout=60)
            except LOST:
                dead.append(peer)
    return dead


def _ended(calls: Mapping[str, ray.ObjectRef]) -> set[ray.ObjectRef]:
    """Those of some pending calls that have ended by now."""
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=0)
    return set(ready)


def _as_they_end(
    pending: dict[ray.ObjectRef, str], timeout_s: float, while_waiting: Callable[[], None]
) -> Iterator[tuple[ray.ObjectRef, str]]:
    """Yields pairs out of `pending` as their calls end; those left in it did not end in time."""
    deadline = time.monotonic() + timeout_s
    while pending:
        left_s = max(0.0, deadline - time.monotonic())
        # All in one call: each looks at every reference that is left, so one for each answer is quadratic in them.
        ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=min(POLL_S, left_s))
        for reference in ready:
            yield reference, pending.pop(reference)
        if not pending or left_s <= POLL_S:
            return
        while_waiting()


def _silent(phase: str, timeout_s: float, peers: list[str]) -> PhaseTimeout:
    return PhaseTimeout(f"{phase}: no answer within {timeout_s:g} s from {', '.join(sorted(peers))}")


def _is_death_of_the_peer_itself(error: RunError) -> bool:
    return isinstance(error, PeerDied) and isinstance(error.__cause__, LOST)


def _look_for_deaths(pending: dict[ray.ObjectRef, str], phase: str) -> None:
    """Raise the death of a peer, if one becomes known within GRACE_S."""
    # A rank whose neighbour dies fails in a collective, often before the death itself is known.
    deadline = time.monotonic() + GRACE_S
    waiting = list(pending)
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        for reference in all_ready(waiting, left_s):
            waiting.remove(reference)
            try:
                result_of(reference, pending[reference], phase)
            except RunError as error:
                if _is_death_of_the_peer_itself(error):
                    raise


def result_of(reference: ray.ObjectRef, peer: str, phase: str) -> Any:
    """Result of a remote call that has ended; errors are raised as `gather` raises them."""
    try:
        return ray.get(reference, timeout=60)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, UserError):
            raise UserError(f"{phase}: {peer}: {cause}") from error
        told = explained(cause) if isinstance(cause, OSError) else None
        raise _kind(cause)(f"{phase}: {peer}: {told or f'{type(cause).__name__}: {cause}'}") from error
    except RayError as error:
        require_raylet(phase)  # whose loss is the cause of most others
        raise translated(error, peer, phase) from error


def _kind(cause: BaseException) -> type[RunError]:
    """Class of the run's error for an exception of a peer."""
    # A lost or silent third process can be cured by a new attempt.
    if isinstance(cause, PeerDied | PhaseTimeout):
        return type(cause)
    if isinstance(cause, LOST):
        return PeerDied
    text = str(cause)
    if not any(mark in text for mark in COLLECTIVE_FAILURES):
        return RunError
    return PhaseTimeout if "imed out" in text else PeerDied


# What Ray's exceptions mean to a run: who is lost, why, and what to change.

LOST = (
    ray_errors.RayActorError,
    ray_errors.OutOfMemoryError,
    ray_errors.OutOfDiskError,
    ray_errors.ObjectLostError,
    ray_errors.ObjectStoreFullError,
    ray_errors.WorkerCrashedError,
    ray_errors.NodeDiedError,
    ray_errors.LocalRayletDiedError,
    ray_errors.RuntimeEnvSetupError,
    ray_errors.RaySystemError,
    ray_errors.RpcError,
    ray_errors.ActorPlacementGroupRemoved,
    ray_errors.TaskPlacementGroupRemoved,
    ray_errors.ActorUnschedulableError,
    ray_errors.TaskUnschedulableError,
)
"""Ray's errors for a process, its node or what it sent being gone; another attempt can have more luck."""


def translated(error: RayError, peer: str, phase: str) -> RunError:
    """Translate one of Ray's errors into one of the run's own.

    Args:
        error: from a call of `peer`, or from Ray itself.
        peer: "policy rank 3", "engine 0".
        phase: what the run was doing.
    """
    if isinstance(error, ray_errors.GetTimeoutError):
        return PhaseTimeout(f"{phase}: the answer of {peer} is ready but could not be fetched in time")
    kind = PeerDied if isinstance(error, LOST) else RunError
    return kind(f"{phase}: {_sentence(error, peer)}")


def _sentence(error: RayError, peer: str) -> str:
    if isinstance(error, ray_errors.OutOfMemoryError):
        return (
            f"{peer} was ended because its node ran out of memory ({_memory(str(error))}). Use less: fewer engines or "
            "ranks on a node, rollout.kv_cache_gb, policy.tokens_per_microbatch; or let Ray wait longer: "
            "RAY_memory_usage_threshold in the environment (a fraction, 0.95 unless set)"
        )
    if isinstance(error, ray_errors.OutOfDiskError):
        return (
            f"what {peer} sent found no room: the disk below Ray's folder (TMPDIR, or ME_NODE_TMP under Slurm) is full "
            f"({_first_line(error)}); make room there, or name a folder elsewhere"
        )
    if isinstance(error, ray_errors.ObjectStoreFullError):
        return (
            f"what {peer} sent found no room in Ray's object store, which lies in /dev/shm ({_first_line(error)}); "
            "give /dev/shm more, or set ME_OBJECT_STORE_BYTES under Slurm"
        )
    if isinstance(error, ray_errors.ObjectLostError):
        return f"what {peer} sent is lost with its node ({_first_line(error)})"
    if isinstance(error, ray_errors.NodeDiedError | ray_errors.LocalRayletDiedError):
        return f"the node of {peer} is gone, or Ray's process on it ({_first_line(error)})"
    if isinstance(error, ray_errors.RuntimeEnvSetupError):
        return f"{peer} could not be started in its environment ({_first_line(error)})"
    if isinstance(error, ray_errors.RayActorError | ray_errors.WorkerCrashedError):
        return f"the process of {peer} died ({_first_line(error)}{_exit_detail(str(error))})"
    return f"Ray failed when {peer} was needed: {type(error).__name__}: {_first_line(error)}"


def _memory(text: str) -> str:
    """Words for the memory that the node and the process used, from Ray's explanation of several paragraphs."""
    # Ray 2.60 "was 22.4GB used / 23.5GB limit", earlier "was running was 22.4GB / 23.5GB".
    node = re.search(r" was ([\d.]+\s?\w+)(?: used)? / ([\d.]+\s?\w+)", text)
    ended = re.findall(r"memory used=([\d.]+\s?\w+)", text)
    parts = [f"{node[1]} of {node[2]} in use"] if node else []
    # Since 2.56 several are ended at once, and nothing says which of them this one was.
    whose = "this process" if len(ended) == 1 else "the processes that were ended"
    parts += [f"{' and '.join(ended)} of it by {whose}"] if ended else []
    return ", ".join(parts) or _first_words(text)


def _exit_detail(text: str) -> str:
    """Words for the end of a process as Ray knows it, from behind its general sentence."""
    found = re.search(r"Worker exit detail: ([^\n]*?)(?: Some common causes| There are some potential|\n|$)", text)
    return f" {found[1].strip()}" if found else ""


def _first_line(error: BaseException) -> str:
    return _first_words(str(error)) or type(error).__name__


def _first_words(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:300] if lines else ""


# Noticing that Ray's own processes are gone: the head, without which calls in flight wait for ever, and the raylet of
# this machine, without which Ray ends the driver without a word as soon as it hands over an object.

PROBE_EVERY_S = 2.0
PROBE_TIMEOUT_S = 2.0
GONE_AFTER_S = 10.0
"""Seconds of refusals after which the head counts as gone.

They are fewer than the 60 s after which Ray ends the process that lost its head, without a word to the run.
"""


def head_refusal() -> OSError | None:
    """Error with which Ray's head refuses a connection; None if it takes it."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        return error
    return None


def require_raylet(phase: str) -> None:
    """Look whether the raylet that this process started still runs; one that another started is not to be seen here.

    To be called before objects are handed over, and about once a second of a wait: it costs microseconds.

    Raises:
        PeerDied: it does not.
    """
    node = ray._private.worker._global_node  # None for a driver that joined a cluster
    if node is not None and any(kind == "raylet" for kind, _ in node.dead_processes()):
        raise PeerDied(
            f"{phase}: Ray's process on this machine, raylet, is gone. Was it ended for want of memory, or /dev/shm "
            "full? `dmesg` says so"
        )


class HeadWatch:
    """Watch over Ray during one wait: the head's (gcs_server's) port must take connections, and the raylet run."""

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._next_probe = time.monotonic() + PROBE_EVERY_S
        self._silent_since = math.inf

    def check(self) -> None:
        """Look after Ray; to be called about once a second.

        Raises:
            PeerDied: the head has refused every connection for GONE_AFTER_S, or there is no raylet any more.
        """
        require_raylet(self._phase)
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
