"""What a verifier is, how it is found by name, and what comes out of asking it.

name -> function                      build_verifier
response -> answer as written         build_reader, for majority votes
ground truth -> answers to try        trials, before training: a truth that cannot be judged is found there
jobs -> verdicts                      judge
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from megatron_entropic.config.names import VERIFIERS, unknown_name, verifier_entry
from megatron_entropic.config.plugins import find_attribute
from megatron_entropic.errors import UserError

Verifier = Callable[[str, Any, Mapping[str, Any]], float]
"""(response text, ground truth, extra_info of the row) -> reward. What it raises is counted as a verifier error."""

BatchVerifier = Callable[[list[str], list[Any], list[Mapping[str, Any]]], Iterable[float]]
"""The same for several responses at once: a function with an attribute `takes_batches` that is true."""


def takes_batches(verifier: Verifier | BatchVerifier) -> bool:
    """Whether a verifier is a `BatchVerifier`."""
    return bool(getattr(verifier, "takes_batches", False))


def build_verifier(name: str, format_pattern: str = "") -> Verifier | BatchVerifier:
    """The verifier called `name`: a built-in one, or `module:function`, also from the current directory.

    Args:
        format_pattern: `reward.format_pattern`, which `format` needs.

    Raises:
        UserError: no such verifier, or its module does not import.
    """
    if problem := unknown_name(name, VERIFIERS, own="module:function"):
        raise UserError(f"verifier {name!r}: {problem}")
    entry = verifier_entry(name)
    function = find_attribute("verifier", entry.target, arguments=4 if entry.takes_pattern else 3)
    verifier: Verifier | BatchVerifier = function
    return partial(function, re.compile(format_pattern, re.DOTALL)) if entry.takes_pattern else verifier


# What came out of judging responses.

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


# What a verifier takes for the answer of a response: majority votes count these, and people look at them.

Reader = Callable[[str], str | None]
"""Response text -> the answer as written, None if there is none."""


def build_reader(verifier: str) -> Reader:
    """How the verifier called `verifier` reads a response: by the function of its row in `config.names`.

    A verifier of one's own may have an attribute `read_answer`, a function of the response; without it no answer is
    known, and a majority cannot be counted.
    """
    entry = verifier_entry(verifier)
    reader: Reader
    if entry.reading is not None:
        reader = find_attribute("verifier", entry.reading, arguments=1)
    else:
        reader = getattr(build_verifier(verifier), "read_answer", _nothing)
    return reader


def _nothing(response: str) -> str | None:
    return None


# Ground truths that a verifier cannot use are found before training: each is tried with an answer or two.


@dataclass(frozen=True, slots=True)
class Trial:
    """An answer to try a ground truth with."""

    response: str
    expected: Literal["right", "wrong", "verdict"]
    """What the verifier must say; "verdict": anything but an error."""

    def objection(self, verdict: Verdict) -> str | None:
        """What the verdict says against the ground truth."""
        if verdict.status == "timeout" and self.expected == "verdict":
            return None  # the change of digits may have made a larger number of it
        if verdict.status != "ok":
            return verdict.message
        if self.expected == "right" and verdict.reward <= 0:
            return "as an answer it is judged wrong"
        if self.expected == "wrong" and verdict.reward > 0:
            return f"the answer {self.response} is judged right"
        return None


def trials(verifier: str, truth: Any) -> list[Trial]:
    """Responses to try a ground truth with before training; none if the verifier takes any.

    Raises:
        UserError: the ground truth is empty.
    """
    entry = verifier_entry(verifier)
    if entry.trials is None:
        return []
    found: list[Trial] = find_attribute("verifier", entry.trials, arguments=1)(truth)
    return found
