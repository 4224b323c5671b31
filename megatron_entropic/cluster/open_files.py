"""How many files, sockets above all, a run's processes open, against the limit of them (`ulimit -n`).

A gloo group is a full mesh: each of its ranks holds a socket to each other one, from the group's start to its end.

    policy rank     one mesh of all ranks, by which checkpoints are agreed on; on a CPU, one for each kind of group
    policy rank 0   besides, the store in which ranks meet: a socket to each, and one to each engine's worker
    Ray, driver     a few to each process of the run
"""

from __future__ import annotations

import resource
import sys

from megatron_entropic.config.run import Config

OF_A_PROCESS = 400
"""Open files of a process that knows no other: libraries, Ray, CUDA. With one rank 95 were counted on a CPU; the rest
is a guess at what a GPU's drivers open."""
OF_A_RANK = 10
"""Sockets to one other policy rank. Rank 0 of 2 to 16 replicas on a CPU, where every group is gloo's: 9 for each.
What NCCL opens to its neighbours is not known."""
OF_A_WORKER = 4
"""Sockets to one worker of an engine: of weights, and of Ray's to the process that drives it. A guess."""


def open_files_needed(config: Config) -> int:
    """Open files of the process of a run that has most of them: the limit that every node must allow."""
    workers = config.rollout.engines * config.rollout.tensor_parallel
    return OF_A_PROCESS + OF_A_RANK * config.policy.world_size + OF_A_WORKER * workers


def open_files_allowed() -> int:
    """Hard limit of open files of this process; `sys.maxsize` where there is none."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def too_few_open_files(limit: int, needed: int) -> str:
    """Words for a limit that is too low."""
    return (
        f"the hard limit of open files (ulimit -Hn) is {limit:,}, and {needed:,} are needed: each process holds "
        "sockets to every other one. Raise it in /etc/security/limits.conf, or in the settings of what starts the job "
        "(LimitNOFILE of slurmd, --ulimit of a container)"
    )
