r"""Ground truths that a verifier cannot use, found before training: each is tried with an answer or two.

`math`: \boxed{ground truth} must be right, another number wrong, and neither these nor the ground truth with its digits
changed may be an error, which in training would give wrong answers the mean reward of their group. Equal strings are
right whether math-verify can parse them or not; other forms of such an answer cannot be recognised then. `countdown`:
the ground truth must have numbers and a target, `ifeval`: known instructions with their arguments. `exact`, `format`
and verifiers of one's own take anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from megatron_entropic.rewards.verdict import Verdict
from megatron_entropic.rewards.verifiers.boxed import gold_answer

# Primes, since no ground truth but themselves equals them by chance.
_ANOTHER_NUMBER = ("7919", "7907")


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
    """Responses to try a ground truth with; none if the verifier has no opinion.

    Raises:
        UserError: the ground truth is empty.
    """
    if verifier in ("countdown", "ifeval"):
        return [Trial("", "verdict")]
    if verifier != "math":
        return []
    gold = gold_answer(truth)
    another = next(number for number in _ANOTHER_NUMBER if number not in gold)
    found = [Trial(_boxed(gold), "right"), Trial(_boxed(another), "wrong")]
    changed = re.sub(r"\d", lambda digit: str((int(digit.group()) + 1) % 10), gold)
    return found if changed == gold else [*found, Trial(_boxed(changed), "verdict")]


def _boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"
