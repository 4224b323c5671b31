"""The verifiers by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from megatron_entropic.config.names import VERIFIERS, unknown_name, verifier_entry
from megatron_entropic.config.plugins import find_attribute
from megatron_entropic.errors import UserError

Verifier = Callable[[str, Any, Mapping[str, Any]], float]
"""(response text, ground truth, extra_info of the row) -> reward. What it raises is counted as a verifier error."""

BatchVerifier = Callable[[list[str], list[Any], list[Mapping[str, Any]]], Iterable[float]]
"""The same for several responses at once: a function with an attribute `takes_batches` that is true."""


def takes_batches(verifier: Verifier | BatchVerifier) -> bool:
    """Whether a verifier is a `BatchVerifier`."""
    return bool(getattr(verifier, "takes_batches", False))


def build_verifier(name: str, format_pattern: str = "") -> Verifier | BatchVerifier:
    """The verifier called `name`: a built-in one, or `module:function`, also from the current directory.

    Args:
        format_pattern: `reward.format_pattern`, which `format` needs.

    Raises:
        UserError: no such verifier, or its module does not import.
    """
    if problem := unknown_name(name, VERIFIERS, own="module:function"):
        raise UserError(f"verifier {name!r}: {problem}")
    function = find_attribute("verifier", verifier_entry(name).target, arguments=4 if name == "format" else 3)
    verifier: Verifier | BatchVerifier = function
    return partial(function, re.compile(format_pattern, re.DOTALL)) if name == "format" else verifier
