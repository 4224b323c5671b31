r"""Ground truths that a verifier cannot use, found before training: each is given to it as an answer to itself.

`math`: \\boxed{ground truth} must be right. Equal strings are, whether math-verify can parse them or not; other forms
of such an answer cannot be recognised then. `countdown`: the ground truth must have numbers and a target, `ifeval`:
known instructions with their arguments. `exact`, `format` and verifiers of one's own take anything.
"""

from __future__ import annotations

from typing import Any

from megatron_entropic.rewards.boxed import gold_answer
from megatron_entropic.rewards.verdict import Verdict


def own_answer(verifier: str, truth: Any) -> str | None:
    """A response to try a ground truth with; None if the verifier has no opinion.

    Raises:
        ValueError: the ground truth is empty.
    """
    if verifier == "math":
        return rf"\boxed{{{gold_answer(truth)}}}"
    return "" if verifier in ("countdown", "ifeval") else None


def objection(verifier: str, verdict: Verdict) -> str | None:
    """What the verdict on `own_answer` says against the ground truth."""
    if verdict.status != "ok":
        return verdict.message
    if verifier == "math" and verdict.reward <= 0:
        return "as an answer it is judged wrong"
    return None
