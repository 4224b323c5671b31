"""A verifier process: `python -m megatron_entropic.rewards.worker NAME TIMEOUT_S CPU_TIME_S MEMORY_GB`.

Jobs come in as pickles on standard input, verdicts go out as JSON lines on what was standard output. The process
ends when its input does, when a job uses up its CPU time, and, should its parent be gone while a job hangs, after the
wall time; the last two by signals whose default action ends the process, so that no Python needs to run.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import signal
import sys
from typing import IO, Any

from megatron_entropic.rewards.verdict import Verdict, judge
from megatron_entropic.rewards.verifiers import BUILT_IN, build_verifier

_ORPHAN_GRACE_S = 30


def main() -> None:
    """Serve jobs until the input ends."""
    name = sys.argv[1]
    timeout_s, cpu_time_s, memory_gb = map(float, sys.argv[2:])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # A verifier that prints must not speak into the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if name in BUILT_IN:
        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        verifier = build_verifier(name)
    except ValueError as error:
        _answer(answers, {"failed": str(error)})
        return
    _answer(answers, {"ready": os.getpid()})
    while True:
        try:
            response, ground_truth, extra_info = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        signal.alarm(math.ceil(timeout_s) + _ORPHAN_GRACE_S)
        signal.setitimer(signal.ITIMER_PROF, cpu_time_s)
        verdict: Verdict = judge(verifier, response, ground_truth, extra_info)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        _answer(answers, {"status": verdict.status, "reward": verdict.reward, "message": verdict.message})


def _answer(answers: IO[str], value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
