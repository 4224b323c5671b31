"""Verifiers as functions, how they are found by name, and the verdicts they give.

name -> function                      build_verifier
response -> answer as written         build_reader, for majority votes; how it is found: `answers`
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

from megatron_entropic.config.data import RewardConfig
from megatron_entropic.config.names import ANSWERS, VERIFIERS, VerifierEntry, unknown_name, verifier_entry
from megatron_entropic.config.plugins import compile_pattern, find_attribute
from megatron_entropic.errors import UserError
from megatron_entropic.types import Verdict

Verifier = Callable[[str, Any, Mapping[str, Any]], float]
"""Function: (response text, ground truth, extra_info of the row) -> reward. An exception of it is a verifier error."""

BatchVerifier = Callable[[list[str], list[Any], list[Mapping[str, Any]]], Iterable["float | Verdict"]]
"""A `Verifier` of several responses at once: a function with an attribute `takes_batches` that is true.

It returns rewards, or verdicts where it knows more than a reward.
"""


def takes_batches(verifier: Verifier | BatchVerifier) -> bool:
    """Whether a verifier is a `BatchVerifier`."""
    return bool(getattr(verifier, "takes_batches", False))


def build_verifier(name: str, reward: RewardConfig | None = None) -> Verifier | BatchVerifier:
    """Find the verifier called `name`: a built-in one, or `module:function`, also from the current directory.

    Args:
        name: a key of `VERIFIERS`, or `module:function`.
        reward: how it finds answers, and the pattern of `format`; None: as by default.

    Raises:
        UserError: no such verifier, or its module does not import.
    """
    if problem := unknown_name(name, VERIFIERS, own="module:function"):
        raise UserError(f"verifier {name!r}: {problem}")
    entry = verifier_entry(name)
    reward = reward or RewardConfig()
    if entry.takes_settings:
        built: BatchVerifier = find_attribute("verifier", entry.target, arguments=1)(reward)
        return built
    function = find_attribute("verifier", entry.target, arguments=4 if entry.takes_pattern else 3)
    if entry.takes_pattern:
        return partial(function, compile_pattern("reward.format_pattern", reward.format_pattern, re.DOTALL))
    if entry.answer is not None:
        return partial(_judge_answer, build_reading(entry, reward), function)
    verifier: Verifier | BatchVerifier = function
    return verifier


def _judge_answer(
    reading: Reader, verdict: Any, response: str, ground_truth: Any, extra_info: Mapping[str, Any]
) -> float:
    """Reward of a verifier made of two functions: one finds the answer, the other judges it."""
    reward: float = verdict(reading(response), ground_truth, extra_info)
    return reward


Reader = Callable[[str], str | None]
"""Function: response text -> the answer as written, None if there is none."""


def build_reading(entry: VerifierEntry, reward: RewardConfig) -> Reader:
    """Function by which a verifier that reads answers finds them: `reward.answer`, by default its own way.

    Raises:
        UserError: there is no such way, or its pattern is none.
    """
    name = answer_name(entry, reward)
    if problem := unknown_name(name, ANSWERS):
        raise UserError(f"reward.answer={name!r}: {problem}")
    way = ANSWERS[name]
    function = find_attribute("answer", way.target, arguments=2 if way.takes_pattern else 1)
    if not way.takes_pattern:
        reading: Reader = function
        return reading
    return partial(function, compile_pattern("reward.answer_pattern", reward.answer_pattern, re.MULTILINE))


def answer_name(entry: VerifierEntry, reward: RewardConfig) -> str:
    """Key of `ANSWERS` for the way in which a verifier finds answers."""
    assert entry.answer is not None, "it looks at responses as they are"
    return reward.answer or entry.answer


# What came out of judging responses.

Job = tuple[str, Any, Mapping[str, Any]]
"""One job of a verifier: response, ground truth, extra_info."""


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
    if isinstance(reward, Verdict):
        return reward
    value = float(reward)
    return Verdict("ok", value) if math.isfinite(value) else Verdict("error", message=f"the verifier returned {value}")


def _failure(error: BaseException) -> Verdict:
    return Verdict("error", message=f"{type(error).__name__}: {error}"[:500])


# What a verifier takes for the answer of a response: majority votes count these, and people look at them.


def build_reader(verifier: str, reward: RewardConfig | None = None) -> Reader:
    """Function by which the verifier called `verifier` reads a response, in the writing that votes count.

    A verifier of one's own may have an attribute `read_answer`, a function of the response; without it no answer is
    known, and a majority cannot be counted.

    Args:
        verifier: name of the verifier.
        reward: how answers are found; None: as by default.
    """
    entry = verifier_entry(verifier)
    if entry.vote is not None:
        reading = build_reading(entry, reward or RewardConfig())
        return partial(_read_vote, reading, find_attribute("verifier", entry.vote, arguments=1))
    if entry.takes_settings:
        return _nothing
    reader: Reader = getattr(build_verifier(verifier), "read_answer", _nothing)
    return reader


def _read_vote(reading: Reader, vote: Reader, response: str) -> str | None:
    answer = reading(response)
    return None if answer is None else vote(answer)


def _nothing(response: str) -> str | None:
    return None


# Ground truths that a verifier cannot use are found before training: each is tried with an answer or two.


@dataclass(frozen=True, slots=True)
class Trial:
    """An answer to try a ground truth with."""

    answer: str
    expected: Literal["right", "wrong", "verdict"]
    """Verdict that the verifier must give; "verdict": anything but an error."""

    def objection(self, verdict: Verdict) -> str | None:
        """Words for what the verdict says against the ground truth; None if nothing."""
        if verdict.status == "timeout" and self.expected == "verdict":
            return None  # the change of digits may have made a larger number of it
        if verdict.status != "ok":
            return verdict.message
        if self.expected == "right" and verdict.reward <= 0:
            return "as an answer it is judged wrong"
        if self.expected == "wrong" and verdict.reward > 0:
            return f"the answer {self.answer} is judged right"
        return None


def trials(verifier: str, truth: Any) -> list[Trial]:
    """Answers to try a ground truth with before training; none if the verifier takes any.

    Raises:
        UserError: the ground truth is empty.
    """
    entry = verifier_entry(verifier)
    if entry.trials is None:
        return []
    found: list[Trial] = find_attribute("verifier", entry.trials, arguments=1)(truth)
    return found


def trial_settings(verifier: str, reward: RewardConfig) -> tuple[RewardConfig, Callable[[str], str]]:
    """Settings for finding answers when ground truths are tried, and the function: answer -> a response with nothing
    else.

    The same as in training, so that a ground truth no response could give (an equation where the last number counts) is
    found too. What a pattern finds nobody can write: there the answers are judged as they are.
    """
    entry = verifier_entry(verifier)
    if entry.answer is None:
        return reward, lambda answer: answer
    if ANSWERS[answer_name(entry, reward)].alone is None:
        reward = reward.model_copy(update={"answer": "whole_response", "answer_pattern": ""})
    return reward, lone_answer(answer_name(entry, reward))


def lone_answer(answer: str) -> Callable[[str], str]:
    """Function: answer -> a response that is nothing but it, for a way to find answers that has one."""
    alone = ANSWERS[answer].alone
    assert alone is not None, "a pattern decides"
    function: Callable[[str], str] = find_attribute("answer", alone, arguments=1)
    return function
