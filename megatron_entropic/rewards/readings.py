r"""What a verifier takes for the answer of a response: majority votes count these, and people look at them."""

from __future__ import annotations

from collections.abc import Callable

from megatron_entropic.rewards.verifier import build_verifier
from megatron_entropic.rewards.verifiers.boxed import last_boxed
from megatron_entropic.rewards.verifiers.math_reading import normalised

Reader = Callable[[str], str | None]
"""Response text -> the answer as written, None if there is none."""


def build_reader(verifier: str) -> Reader:
    r"""How the verifier called `verifier` reads a response.

    `math` reads the last \boxed{} as `math_forms.normalised` writes it; `exact` and `countdown` read the whole
    response. A verifier of one's own may have an attribute `read_answer`, a function of the response; without it no
    answer is known, and a majority cannot be counted.
    """
    if verifier == "math":
        return _boxed
    if verifier in ("exact", "countdown"):
        return _whole
    reader: Reader = getattr(build_verifier(verifier), "read_answer", _nothing)
    return reader


def _boxed(response: str) -> str | None:
    answer = last_boxed(response)
    return None if answer is None else normalised(answer) or None


def _whole(response: str) -> str | None:
    return response.strip() or None


def _nothing(response: str) -> str | None:
    return None
