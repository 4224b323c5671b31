"""The schedule of a run that is replayed, as far as the driver has to know it: which engine takes what, and loses it.

An attempt that a recorded engine had when it was lost was taken up by another one later, with the tokens it had at its
last cut. In a replay nobody is lost: the first engine goes on with it to the end of its record, so that others run
beside what ran beside them, and the driver moves it on as soon as it has those tokens.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from megatron_entropic.rollout.schedule import Taken, read_assignments
from megatron_entropic.types import GenerationRequest


class Followed:
    """Who takes up each attempt of a recorded run, one time after the other."""

    def __init__(self, run_dir: Path, names: list[str]) -> None:
        """Read the schedules of `run_dir`; `names` are those of the engines, in their order.

        Raises:
            UserError: there are none.
        """
        self._names = names
        self._taken = read_assignments(run_dir, len(names))
        self._times: Counter[tuple[str, int]] = Counter()
        self._moving: dict[tuple[str, tuple[int, ...]], dict[int, GenerationRequest]] = {}

    def engine(self, group: str, sample: int) -> str | None:
        """Name of the engine that takes up an attempt now; None: the record does not say."""
        taken = self._now(group, sample)
        return None if taken is None else self._names[taken.engine]

    def handed_out(self, group: str, sample: int) -> int | None:
        """Count one time; returns the number of tokens with which the next one will have it, None if there is none."""
        self._times[group, sample] += 1
        following = self._now(group, sample)
        return None if following is None else following.done

    def move(self, group: str, sample: int, request: GenerationRequest) -> dict[int, GenerationRequest]:
        """Move an attempt on; returns all that are taken up together once the last of them has come, else nothing."""
        taken = self._now(group, sample)
        assert taken is not None, "somebody takes it up next"
        together = self._moving.setdefault((group, taken.samples), {})
        together[sample] = request
        if len(together) < len(taken.samples):
            return {}
        return {one: together[one] for one in taken.samples}

    def _now(self, group: str, sample: int) -> Taken | None:
        taken, times = self._taken.get((group, sample), []), self._times[group, sample]
        return taken[times] if times < len(taken) else None
