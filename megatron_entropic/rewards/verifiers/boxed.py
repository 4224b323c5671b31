r"""What stands in a \boxed{}. Apart from its verifier, so that reading an answer loads no computer algebra."""

from __future__ import annotations

import re
from typing import Any

from megatron_entropic.errors import UserError


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{} of a text, braces balanced; None without one or if it is not closed."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : start + brace.start()].strip()
    return None


def gold_answer(ground_truth: Any) -> str:
    r"""The answer in a ground truth: LaTeX or a number, with or without \boxed{}, or GSM8K's rationale.

    Of a dictionary its `answer` or `target`.

    Raises:
        UserError: it is empty.
    """
    if isinstance(ground_truth, dict):
        ground_truth = ground_truth.get("answer", ground_truth.get("target"))
    if ground_truth is None or not str(ground_truth).strip():
        raise UserError("the ground truth is empty")
    text = str(ground_truth).strip()
    boxed = last_boxed(text)
    if boxed is None:
        # GSM8K's column is a rationale, with the answer behind the last four hashes.
        boxed = text.rpartition("####")[2].strip() or text
    if not boxed:
        raise UserError("the ground truth is empty")
    return boxed
