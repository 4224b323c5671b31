"""A verifier that a nearly untrained model can please, so that a few steps have gradients."""

from __future__ import annotations

from typing import Any

from megatron_entropic.rewards.verifiers.math import math_answer


def digit_share(response: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    """Share of the response's characters that are digits, 0 for an empty response."""
    return sum(character.isdigit() for character in response) / max(1, len(response))


def first_digit_is_even(response: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    """1.0 if the response's first digit is even, 0.0 if it is odd or there is none."""
    digit = _first_digit(response)
    return float(digit is not None and int(digit) % 2 == 0)


def boxed_as_it_is(response: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    """math-verify's opinion of the beginning of a response as if it stood in a box: something for it to parse."""
    return math_answer(rf"\boxed{{{response[:40]}}}", ground_truth, extra_info)


def _first_digit(response: str) -> str | None:
    return next((character for character in response if character in "0123456789"), None)


first_digit_is_even.read_answer = _first_digit  # type: ignore[attr-defined]
