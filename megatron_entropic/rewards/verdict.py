"""What came out of judging responses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_entropic.errors import UserError
from megatron_entropic.rewards.verifier import BatchVerifier, Verifier, takes_batches

Job = tuple[str, Any, Mapping[str, Any]]
"""Response, ground truth, extra_info."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A reward, or the reason why there is none."""

    status: Literal["ok", "timeout", "error"]
    reward: float = 0.0
    message: str = ""


def judge(verifier: Verifier | BatchVerifier, jobs: Sequence[Job]) -> list[Verdict]:
    """Ask a verifier in this process; whatever it raises becomes an error verdict, of all jobs if it takes batches."""
    if takes_batches(verifier):
        return _judge_together(verifier, jobs)
    return [_judge_one(verifier, *job) for job in jobs]


def _judge_one(verifier: Any, response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> Verdict:
    try:
        return _verdict(verifier(response, ground_truth, extra_info))
    except (Exception, SystemExit) as error:  # noqa: BLE001  foreign code: its failure is an outcome to count
        return _failure(error)


def _judge_together(verifier: Any, jobs: Sequence[Job]) -> list[Verdict]:
    responses, truths, extras = ([job[part] for job in jobs] for part in range(3))
    try:
        rewards = list(verifier(responses, truths, extras))
        if len(rewards) != len(jobs):
            raise UserError(f"the verifier returned {len(rewards)} rewards for {len(jobs)} responses")
        return [_verdict(reward) for reward in rewards]
    except (Exception, SystemExit) as error:  # noqa: BLE001  as above
        return [_failure(error)] * len(jobs)


def _verdict(reward: Any) -> Verdict:
    value = float(reward)
    return Verdict("ok", value) if math.isfinite(value) else Verdict("error", message=f"the verifier returned {value}")


def _failure(error: BaseException) -> Verdict:
    return Verdict("error", message=f"{type(error).__name__}: {error}"[:500])
