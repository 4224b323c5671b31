"""Verifiers and readings that take a response as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_entropic.rewards.verifier import Trial


def exact(response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """1.0 if the response equals the ground truth as a string, white space around both ignored; else 0.0."""
    return float(response.strip() == str(ground_truth).strip())


# Whether a response has the form that was asked for, whatever it says.


def response_format(pattern: re.Pattern[str], response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """1.0 if the whole response matches the pattern (`reward.format_pattern`), white space around it ignored."""
    return float(pattern.fullmatch(response.strip()) is not None)


def whole_response(response: str) -> str | None:
    """The response is the answer; None if nothing stands in it."""
    return response.strip() or None


def any_verdict(ground_truth: Any) -> list[Trial]:
    """A ground truth is good if an empty response can be judged with it."""
    return [Trial("", "verdict")]
