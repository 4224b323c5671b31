"""A verifier process: `python -m megatron_entropic.rewards.worker NAME TIMEOUT_S`.

Jobs come in as pickles on standard input, verdicts go out as JSON lines on what was standard output. The process
ends when its input does, and, should its parent be gone while a job hangs, by an alarm that needs no Python.
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

_MEMORY_LIMIT = 4 << 30
_ORPHAN_GRACE_S = 30


def main() -> None:
    """Serve jobs until the input ends."""
    name, timeout_s = sys.argv[1], float(sys.argv[2])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # A verifier that prints must not speak into the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if name in BUILT_IN:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
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
        verdict: Verdict = judge(verifier, response, ground_truth, extra_info)
        signal.alarm(0)
        _answer(answers, {"status": verdict.status, "reward": verdict.reward, "message": verdict.message})


def _answer(answers: IO[str], value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
