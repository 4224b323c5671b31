"""Forks ranks from one process that has imported what they all need, which takes longer than most of their work.

    python rank_server.py        requests and answers are lines of JSON on standard input and output

    {"command": [SCRIPT, ARGUMENT ...], "ranks": [{"environment": {...}, "stdout": FILE, "stderr": FILE} ...]}
        starts one process per rank, each the leader of a process group, and answers their ids
    {"poll": [ID ...]}
        answers the exit status of each, null while it runs

Nothing here starts a thread, joins a process group or changes megatron-core: a rank finds the modules as if it had just
imported them. What differs from an interpreter of its own is the seed of `hash()`, which all ranks share; the ranks of
end-to-end tests do not.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
from typing import Any

from megatron_entropic.policy.megatron.cpu_patches import import_megatron
from megatron_entropic.policy.megatron.platform import silence_known_noise

PRELOADED = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron_entropic.policy.policy",
    "megatron_entropic.policy.score_worker",
)


def preload() -> None:
    """Imports what ranks would otherwise import one by one."""
    silence_known_noise()
    import_megatron()
    for name in PRELOADED:
        importlib.import_module(name)
    # Else every rank looks for garbage among what is here, and writes to each object, which copies its memory.
    gc.collect()
    gc.freeze()


def start(command: list[str], rank: dict[str, Any]) -> int:
    """Id of a new process that runs the command with the rank's environment and files. In it, this never returns."""
    child = os.fork()
    if child:
        os.setpgid(child, child)
        return child
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number, name in ((0, os.devnull), (1, rank["stdout"]), (2, rank["stderr"])):
        file = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(rank["environment"])
    sys.argv = command
    # As the interpreter has it when it is given a script.
    sys.path[0] = os.path.dirname(command[0])
    runpy.run_path(command[0], run_name="__main__")
    sys.exit(0)


def poll(children: list[int], ended: dict[int, int]) -> list[int | None]:
    """Exit status of each process, negative for the signal that ended it; None while it runs."""
    for child in set(children) - set(ended):
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            ended[child] = os.waitstatus_to_exitcode(status)
    return [ended.get(child) for child in children]


def main() -> None:
    """Answers until the other side closes its end."""
    preload()
    # Whoever asks for this server handles the keyboard.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: list[Any]
        if "poll" in request:
            answer = poll(request["poll"], ended)
        else:
            answer = [start(request["command"], rank) for rank in request["ranks"]]
            for child in answer:
                ended.pop(child, None)  # the id of a process that is long gone
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
