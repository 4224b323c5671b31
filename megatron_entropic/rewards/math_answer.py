r"""A mathematical answer in \boxed{}, compared by math-verify.

math-verify's own time limits are off: they measure wall time, and turn a slow machine into a silent "wrong". The
process this runs in is killed from outside instead, and that is counted (`pool`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from math_verify import parse, verify

from megatron_entropic.errors import UserError
from megatron_entropic.rewards.boxed import gold_answer, last_boxed

_ANSWER_CHARACTERS = 300
# A sign of mathematics or of money: neither is part of a value, and a backslash left alone would be.
_DOLLAR = re.compile(r"\\?\$")

for _name in ("math_verify.parser", "math_verify.grader"):
    # Otherwise every comparison warns that the limits are off.
    logging.getLogger(_name).setLevel(logging.ERROR)


def math_answer(response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    r"""1.0 if the last \boxed{} of the response equals the ground truth mathematically, else 0.0.

    No box, an unclosed one, or an answer far longer than any right one is wrong without being parsed.

    Args:
        ground_truth: LaTeX or a number, with or without \boxed{}; or a dictionary with `answer` or `target`.

    Raises:
        UserError: a ground truth that cannot be read.
    """
    gold, answer = gold_answer(ground_truth), last_boxed(response)
    if answer is None or len(answer) > max(_ANSWER_CHARACTERS, 2 * len(gold)):
        return 0.0
    if _bare(answer) == _bare(gold):
        return 1.0
    parsed_gold = _parse(gold)
    if not parsed_gold:
        raise UserError(f"the ground truth {gold!r} cannot be read as mathematics")
    return float(verify(parsed_gold, _parse(answer), timeout_seconds=None, raise_on_error=True))


def _bare(text: str) -> str:
    """Without white space and dollar signs: enough for most right answers, and far quicker than parsing."""
    return re.sub(r"\s|\\?\$", "", text)


def _parse(latex: str) -> list[Any]:
    parsed: list[Any] = parse(rf"\boxed{{{_DOLLAR.sub('', latex)}}}", parsing_timeout=None, raise_on_error=True)
    return parsed
