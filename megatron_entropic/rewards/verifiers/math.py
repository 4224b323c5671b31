r"""A mathematical answer in \boxed{}, compared by math-verify.

math-verify's own time limits are off: they measure wall time, and turn a slow machine into a silent "wrong". The
process this runs in is killed from outside instead, and that is counted (`pool`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from math_verify import LatexExtractionConfig, parse

from megatron_entropic.errors import UserError
from megatron_entropic.rewards.verifiers.boxed import gold_answer, last_boxed
from megatron_entropic.rewards.verifiers.math_reading import (
    base,
    compared_as_written,
    normalised,
    plain_number,
    prepared,
    scaled,
)
from megatron_entropic.rewards.verifiers.math_values import equal, undefined

_ANSWER_CHARACTERS = 300
# LaTeX alone: by default the first number of what cannot be parsed is taken for all of it.
_EXTRACTION = (LatexExtractionConfig(),)

for _name in ("math_verify.parser", "math_verify.grader"):
    # Otherwise every comparison warns that the limits are off.
    logging.getLogger(_name).setLevel(logging.ERROR)


def math_answer(response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    r"""1.0 if the last \boxed{} of the response equals the ground truth mathematically, else 0.0.

    No box, an unclosed one, or an answer far longer than any right one is wrong without being parsed. What nobody can
    parse, such as a time of day, and what parsing would lose, such as ellipses, is compared as written.

    Args:
        ground_truth: LaTeX or a number, with or without \boxed{}; or a dictionary with `answer` or `target`.

    Raises:
        UserError: a ground truth that cannot be read, or not even be compared with itself.
    """
    gold, answer = gold_answer(ground_truth), last_boxed(response)
    if answer is None or len(answer) > max(_ANSWER_CHARACTERS, 2 * len(gold)):
        return 0.0
    forms = normalised(gold), normalised(answer)
    if forms[0] == forms[1]:
        return 1.0
    numbers = plain_number(forms[0]), plain_number(forms[1])
    if None not in numbers:
        return float(numbers[0] == numbers[1])
    return float(_equal(prepared(gold), prepared(answer)))


def _equal(gold: str, answer: str) -> bool:
    """Whether two prepared answers of different writing are equal."""
    if compared_as_written(gold) or compared_as_written(answer) or _of_different_kinds(gold, answer):
        return False
    if scaled(gold) != gold:
        gold, answer = scaled(gold), scaled(answer)
    elif scaled(answer) != answer and _equal(gold, scaled(answer)):
        return True  # otherwise million is a unit that the question asks for, and ignored as all units are
    golds, answers = ([value for value in _parse(text) if not undefined(value)] for text in (gold, answer))
    if not golds:
        raise UserError(f"the ground truth {gold!r} cannot be read as mathematics")
    try:
        return any(equal(one, other) for one in golds for other in answers)
    except Exception:  # noqa: BLE001  sympy raises anything
        # Whose fault is it? An answer that sympy cannot compare is wrong. A ground truth that it cannot compare even
        # with itself raises here, and the check before training finds it.
        any(equal(one, one) for one in golds)
        return False


def _of_different_kinds(gold: str, answer: str) -> bool:
    """What math-verify takes for the same: numbers in different bases, and sets for tuples or intervals."""
    bases = base(gold), base(answer)
    if None not in bases and bases[0] != bases[1]:
        return True
    kinds = [
        (text.startswith(r"\{") and "," in text, re.fullmatch(r"\([^()]*\)", text) is not None)
        for text in (gold, answer)
    ]
    return kinds in ([(True, False), (False, True)], [(False, True), (True, False)])


def _parse(latex: str) -> list[Any]:
    """The value, where it can be parsed, and what was parsed as a string."""
    parsed: list[Any] = parse(rf"\boxed{{{latex}}}", _EXTRACTION, parsing_timeout=None, raise_on_error=True)
    return parsed
