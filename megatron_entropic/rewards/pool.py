"""Verifiers in processes of their own: one that hangs is killed, one that crashes takes nothing along.

One thread talks to all processes. Jobs go out in chunks, so that a process need not wait for its next one; verdicts
come back one by one, and each job has the time limits to itself.
"""

from __future__ import annotations

import math
import select
import time
from collections import deque
from collections.abc import Sequence

from megatron_entropic.config import RewardConfig
from megatron_entropic.errors import RunError
from megatron_entropic.rewards.process import VerifierProcess
from megatron_entropic.rewards.verdict import Job, Verdict

_LONGEST_CHUNK = 16


class VerifierPool:
    """A fixed number of verifier processes, reused from job to job and replaced when they die."""

    def __init__(self, config: RewardConfig, verifier: str):
        """Start the processes and wait until each has imported its verifier.

        Raises:
            ValueError: the verifier does not exist or does not import.
            RunError: a process did not start.
        """
        self._batch_size = config.batch_size
        self._processes = [VerifierProcess(config, verifier) for _ in range(config.workers)]
        try:
            for process in self._processes:
                process.start()
            while any(not process.ready for process in self._processes):
                self._wait()
                for process in self._processes:
                    process.advance()
                    process.raise_if_failed()
        except (ValueError, RunError):
            self.close()
            raise

    def judge(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Verdicts in the order of the jobs."""
        verdicts: dict[int, Verdict] = {}
        waiting = deque(range(len(jobs)))
        while len(verdicts) < len(jobs):
            for process in self._processes:
                if not process.alive:
                    if waiting and process.failure:
                        # Each failed start costs one job, so that this ends.
                        verdicts[waiting.popleft()] = Verdict("error", message=process.failure)
                    process.start()
                if process.ready and not process.busy and waiting:
                    size = self._chunk_size(process, len(waiting))
                    numbers = [waiting.popleft() for _ in range(size)]
                    process.assign([(number, jobs[number]) for number in numbers])
            if len(verdicts) < len(jobs):
                self._wait()
            for process in self._processes:
                answered, left = process.advance()
                verdicts.update(answered)
                waiting.extendleft(reversed(left))
        return [verdicts[number] for number in range(len(jobs))]

    def close(self) -> None:
        """End every process."""
        for process in self._processes:
            process.stop()

    def _chunk_size(self, process: VerifierProcess, waiting: int) -> int:
        """Large while there is much to do; at the end small, so that no process has a queue while others are idle."""
        if process.takes_batches:
            return min(self._batch_size, waiting)
        return max(1, min(_LONGEST_CHUNK, waiting // (4 * len(self._processes))))

    def _wait(self) -> None:
        """Until a process can be read or written, or its limit passes."""
        poll = select.poll()
        deadline = math.inf
        for process in self._processes:
            for descriptor, events in process.interests():
                poll.register(descriptor, events)
            deadline = min(deadline, process.deadline)
        limit_s = max(0.0, deadline - time.monotonic())
        poll.poll(None if math.isinf(limit_s) else math.ceil(1000 * limit_s))
