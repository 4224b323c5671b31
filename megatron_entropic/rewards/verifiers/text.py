"""Verifiers that compare an answer or a response as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_entropic.rewards.verifier import Trial


def exact(answer: str | None, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """Return 1.0 if the answer equals the ground truth as a string, white space around both ignored; else 0.0."""
    return float(answer is not None and answer.strip() == str(ground_truth).strip())


# Whether a response has the form that was asked for, whatever it says.


def response_format(pattern: re.Pattern[str], response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """Return 1.0 if the whole response matches `reward.format_pattern`, white space around it ignored; else 0.0."""
    return float(pattern.fullmatch(response.strip()) is not None)


def vote(answer: str) -> str | None:
    """The answer without white space around it; None if it is blank."""
    return answer.strip() or None


def any_verdict(ground_truth: Any) -> list[Trial]:
    """Trial of a ground truth with an empty answer, which the verifier must be able to judge."""
    return [Trial("", "verdict")]
