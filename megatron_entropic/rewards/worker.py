"""A verifier process: `python -m megatron_entropic.rewards.worker NAME REWARD`.

REWARD is the section `reward` of the configuration as JSON.

Chunks of jobs come in as pickles on standard input, verdicts go out as JSON lines on what was standard output, each as
soon as it is there. The process ends when its input does, when a job uses up its CPU time, and, should its parent be
gone while a job hangs, after the wall time; the last two by signals whose default action ends the process, so that no
Python needs to run. A verifier that takes batches gets a chunk in one call, with the limits of one job.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import signal
import sys
from dataclasses import asdict
from typing import IO, Any

from megatron_entropic.config.data import RewardConfig
from megatron_entropic.config.names import VERIFIERS
from megatron_entropic.rewards.verifier import Job, build_verifier, judge, takes_batches

_ORPHAN_GRACE_S = 30


def main() -> None:
    """Serve jobs until the input ends."""
    name, reward = sys.argv[1], RewardConfig.model_validate_json(sys.argv[2])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # A verifier that prints must not speak into the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if name in VERIFIERS:
        limit = int(reward.memory_limit_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        verifier = build_verifier(name, reward)
    except ValueError as error:
        _answer(answers, {"failed": str(error)})
        return
    batches = takes_batches(verifier)
    _answer(answers, {"ready": os.getpid(), "takes_batches": batches})
    while True:
        try:
            chunk: list[Job] = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        for jobs in [chunk] if batches else [[job] for job in chunk]:
            signal.alarm(math.ceil(reward.timeout_s) + _ORPHAN_GRACE_S)
            signal.setitimer(signal.ITIMER_PROF, reward.cpu_time_s)
            verdicts = judge(verifier, jobs)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            for verdict in verdicts:
                _answer(answers, asdict(verdict))


def _answer(answers: IO[str], value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
