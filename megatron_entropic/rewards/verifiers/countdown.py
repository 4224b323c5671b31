"""Countdown: an expression of given numbers, each used exactly once, that equals a target."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from megatron_entropic.errors import UserError

_NUMBER = r"[0-9]{1,9}"
_EXPRESSION = re.compile(rf"{_NUMBER}(?:[+\-*]{_NUMBER})*")
_MAX_CHARACTERS = 1000


def countdown(answer: str | None, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """Return 1.0 if the whole answer, by default the response, is a right expression, else 0.0.

    An expression is numbers joined by + - *, with * before + and -; white space is ignored, and nothing else may stand
    in the answer. Reading it takes time linear in its length, which is limited.

    Args:
        answer: the answer; None is wrong.
        ground_truth: {"numbers": [...], "target": n}, or the same as a JSON string.
        extra_info: not used.

    Raises:
        UserError: a ground truth that is not of this form.
    """
    numbers, target = _problem(ground_truth)
    expression = "" if answer is None else "".join(answer.split())
    value = expression_value(expression)
    if value is None or sorted(map(int, re.findall(_NUMBER, expression))) != sorted(numbers):
        return 0.0
    return float(value == target)


def expression_value(text: str) -> int | None:
    """Value of an expression as `countdown` takes it; None if the text is none."""
    expression = "".join(text.split())
    if len(expression) > _MAX_CHARACTERS or not _EXPRESSION.fullmatch(expression):
        return None
    return _value(expression)


def _problem(ground_truth: Any) -> tuple[list[int], int]:
    problem = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    try:
        return [int(number) for number in problem["numbers"]], int(problem["target"])
    except (KeyError, TypeError) as error:
        raise UserError(f"expected a ground truth with numbers and target, found {ground_truth!r}") from error


def _value(expression: str) -> int:
    """Value of an expression that matches `_EXPRESSION`: a sum of signed products."""
    total = 0
    for sign, product in re.findall(r"(^|[+-])([0-9*]+)", expression):
        value = -1 if sign == "-" else 1
        for factor in product.split("*"):
            value *= int(factor)
        total += value
    return total
