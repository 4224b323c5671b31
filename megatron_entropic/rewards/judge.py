"""One verifier that judges jobs, in processes of its own or in this one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from megatron_entropic.config.names import ANSWERS, VerifierEntry, is_instant, verifier_entry
from megatron_entropic.config.run import RewardConfig
from megatron_entropic.rewards.pool import VerifierPool
from megatron_entropic.rewards.verifier import (
    Job,
    answer_name,
    build_reading,
    build_verifier,
    judge,
    lone_answer,
    takes_batches,
)
from megatron_entropic.types import Verdict

logger = logging.getLogger(__name__)


class Judge:
    """A verifier in `reward.workers` processes, each response within its limits.

    With 0 workers, and for verifiers that take no time, this process judges itself, without a time limit.
    """

    def __init__(self, config: RewardConfig, name: str):
        """Load the verifier called `name`, in its processes if it gets some.

        Raises:
            ValueError: the verifier does not exist or does not import.
            RunError: a verifier process did not start.
        """
        self.name = name
        entry = verifier_entry(name)
        self.reads_prompt = entry.reads_prompt
        """Whether the jobs are to have the text of the prompt (`scorer.job_of`)."""
        self.decisive = _decisive(entry, config) if entry.once else None
        """Function: response -> a shorter one with the same verdict; None where equal responses are judged again."""
        self._batch_size = config.batch_size
        self._pool: VerifierPool | None = None
        if config.workers == 0 or is_instant(name, config.answer):
            self._verifier = build_verifier(name, config)
        else:
            self._pool = VerifierPool(config, name)

    def judging(self, count: int) -> Judging:
        """Begin to judge `count` jobs, which may come later."""
        return Judging(self, count)

    def verdicts(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Verdicts in the order of the jobs; nothing a verifier does is raised."""
        with self.judging(len(jobs)) as judging:
            for position, job in enumerate(jobs):
                judging.add(position, job)
            return judging.verdicts()

    def call_size(self, count: int) -> int:
        """Number of jobs that the verifier gets in one call, if there are `count` of them."""
        if self._pool:
            return self._batch_size if self._pool.takes_batches else 1
        return max(1, count) if takes_batches(self._verifier) else 1

    def submit(self, jobs: list[Job]) -> Future[list[Verdict]]:
        """Begin one call; the future gets the verdicts on its jobs, in their order."""
        if self._pool:
            return self._pool.submit(jobs)
        done: Future[list[Verdict]] = Future()
        done.set_result(judge(self._verifier, jobs))
        return done

    def close(self) -> None:
        """End the verifier processes."""
        if self._pool:
            self._pool.close()


def _decisive(entry: VerifierEntry, config: RewardConfig) -> Callable[[str], str] | None:
    """Function: response -> its answer alone. None where finding it may take any time, which is not for the driver."""
    way = answer_name(entry, config)
    if ANSWERS[way].alone is None:
        return None
    reading, alone = build_reading(entry, config), lone_answer(way)

    def decisive(response: str) -> str:
        answer = reading(response)
        return "" if answer is None else alone(answer)

    return decisive


class Judging:
    """Jobs that come one by one, in any order, and are judged meanwhile; a context manager.

    The verdicts do not depend on the order of arrival: a verifier that takes batches gets jobs in the same batches,
    those of neighbouring positions, each when it is complete. What is not begun when the context ends never is.
    """

    def __init__(self, judge: Judge, count: int):
        """Expect jobs at the positions 0, ..., count - 1."""
        self._judge = judge
        self.reads_prompt = judge.reads_prompt
        self._size = judge.call_size(count)
        self._jobs: list[Job | None] = [None] * count
        self._settled: dict[int, Verdict] = {}
        self._missing = [min(self._size, count - first) for first in range(0, count, self._size)]
        self._calls: dict[int, Future[list[Verdict]]] = {}
        self._by_answer: dict[tuple[str, str], Future[list[Verdict]]] = {}

    def add(self, position: int, job: Job) -> None:
        """Take one job; it is judged from now on, or when its batch is complete."""
        assert self._jobs[position] is None, "every position once"
        self._jobs[position] = job
        self._count(position)

    def settle(self, position: int, verdict: Verdict) -> None:
        """Take a verdict that is there already, so that nobody has to judge the position."""
        self._settled[position] = verdict
        self._count(position)

    def _count(self, position: int) -> None:
        call = position // self._size
        self._missing[call] -= 1
        if not self._missing[call]:
            members = self._jobs[call * self._size : (call + 1) * self._size]
            if jobs := [member for member in members if member is not None]:
                self._calls[call] = self._submitted(jobs)

    @property
    def ready(self) -> bool:
        """Whether all jobs have come and are judged."""
        return not any(self._missing) and all(future.done() for future in self._calls.values())

    def verdicts(self, *, warn: bool = False) -> list[Verdict]:
        """Wait for the verdicts on all jobs, in the order of their positions.

        Args:
            warn: write one line into the log if there are failures among them.
        """
        assert not any(self._missing), "every job must have come"
        judged = iter([verdict for call in sorted(self._calls) for verdict in self._calls[call].result()])
        verdicts = [self._settled[place] if job is None else next(judged) for place, job in enumerate(self._jobs)]
        failed = [verdict for verdict in verdicts if verdict.status != "ok"]
        if warn and failed:
            logger.warning(
                "verifier %s failed on %d of %d responses; the first: %s (%s)",
                self._judge.name,
                len(failed),
                len(verdicts),
                failed[0].status,
                failed[0].message,
            )
        return verdicts

    def cancel(self) -> None:
        """Do not begin to judge jobs that are not wanted any more; verdicts that are there stay."""
        for future in self._calls.values():
            future.cancel()

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def _submitted(self, jobs: list[Job]) -> Future[list[Verdict]]:
        if self._judge.decisive is None:
            return self._judge.submit(jobs)
        # Responses to one prompt often agree: each answer is judged once.
        ((response, truth, extra_info),) = jobs
        answer = (self._judge.decisive(response), repr(truth))
        if answer not in self._by_answer:
            self._by_answer[answer] = self._judge.submit([(answer[0], truth, extra_info)])
        return self._by_answer[answer]
