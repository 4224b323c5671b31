"""What Ray's exceptions mean to a run: who is lost, why, and what to change."""

from __future__ import annotations

import re

from ray import exceptions as ray_errors
from ray.exceptions import RayError

from megatron_entropic.errors import PeerDied, PhaseTimeout, RunError

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
"""A process, its node or what it sent is gone; another attempt can have more luck."""


def translated(error: RayError, peer: str, phase: str) -> RunError:
    """The run's own error for one of Ray's.

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
            f"({_first_line(error)})"
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
    """What the node and the process used, out of Ray's explanation of several paragraphs."""
    # Ray 2.60 "was 22.4GB used / 23.5GB limit", earlier "was running was 22.4GB / 23.5GB".
    node = re.search(r" was ([\d.]+\s?\w+)(?: used)? / ([\d.]+\s?\w+)", text)
    process = re.search(r"memory used=([\d.]+\s?\w+)", text)
    parts = [f"{node[1]} of {node[2]} in use"] if node else []
    parts += [f"{process[1]} of it by this process"] if process else []
    return ", ".join(parts) or _first_words(text)


def _exit_detail(text: str) -> str:
    """What Ray knows of the end of a process, behind its general sentence."""
    found = re.search(r"Worker exit detail: ([^\n]*?)(?: Some common causes| There are some potential|\n|$)", text)
    return f" {found[1].strip()}" if found else ""


def _first_line(error: BaseException) -> str:
    return _first_words(str(error)) or type(error).__name__


def _first_words(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:300] if lines else ""
