"""One verifier, wherever it runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_entropic.config import RewardConfig
from megatron_entropic.rewards.boxed import last_boxed
from megatron_entropic.rewards.pool import VerifierPool
from megatron_entropic.rewards.verdict import Job, Verdict, judge
from megatron_entropic.rewards.verifiers import INSTANT, build_verifier

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
        self._pool: VerifierPool | None = None
        if config.workers == 0 or name in INSTANT:
            self._verifier = build_verifier(name, config.format_pattern)
        else:
            self._pool = VerifierPool(config, name)

    def verdicts(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Verdicts in the order of the jobs; nothing a verifier does is raised."""
        if self.name != "math":
            return self._judged(jobs)
        # Only the last box counts there, and the responses to one prompt often agree: each answer is judged once.
        answers = [(_box_alone(response), repr(truth)) for response, truth, _ in jobs]
        first = {answer: position for position, answer in reversed(list(enumerate(answers)))}
        distinct = {answer: (answer[0], *jobs[position][1:]) for answer, position in first.items()}
        found = dict(zip(distinct, self._judged(list(distinct.values())), strict=True))
        return [found[answer] for answer in answers]

    def warned_verdicts(self, jobs: Sequence[Job]) -> list[Verdict]:
        """`verdicts`, with one line in the log if there are failures among them."""
        verdicts = self.verdicts(jobs)
        failed = [verdict for verdict in verdicts if verdict.status != "ok"]
        if failed:
            logger.warning(
                "verifier %s failed on %d of %d responses; the first: %s (%s)",
                self.name,
                len(failed),
                len(verdicts),
                failed[0].status,
                failed[0].message,
            )
        return verdicts

    def close(self) -> None:
        """End the verifier processes."""
        if self._pool:
            self._pool.close()

    def _judged(self, jobs: Sequence[Job]) -> list[Verdict]:
        return self._pool.judge(jobs) if self._pool else judge(self._verifier, jobs)


def _box_alone(response: str) -> str:
    r"""The last box of a response without the rest; empty if it has none.

    The blank keeps a backslash at the end of the answer from escaping the brace.
    """
    answer = last_boxed(response)
    return "" if answer is None else rf"\boxed{{{answer} }}"
