"""The verifiers by name."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from megatron_entropic.errors import UserError

Verifier = Callable[[str, Any, Mapping[str, Any]], float]
"""(response text, ground truth, extra_info of the row) -> reward. What it raises is counted as a verifier error."""

BatchVerifier = Callable[[list[str], list[Any], list[Mapping[str, Any]]], Iterable[float]]
"""The same for several responses at once: a function with an attribute `takes_batches` that is true."""

BUILT_IN = {
    "countdown": "megatron_entropic.rewards.countdown:countdown",
    "exact": "megatron_entropic.rewards.exact:exact",
    "format": "megatron_entropic.rewards.response_format:response_format",
    "ifeval": "megatron_entropic.rewards.ifeval:ifeval",
    "math": "megatron_entropic.rewards.math_answer:math_answer",
}

INSTANT = frozenset({"countdown", "exact"})
"""Built-in verifiers whose time is bounded and far below that of asking another process."""


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
    target = BUILT_IN.get(name, name)
    module_name, separator, function_name = target.partition(":")
    if not separator:
        raise UserError(f"no verifier {name!r}: expected one of {', '.join(BUILT_IN)}, or module:function")
    # An installed command does not look into the current directory; people keep their own verifiers there.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"verifier {name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"verifier {name!r}: the module {module_name} has no function {function_name!r}")
    verifier: Verifier | BatchVerifier = function
    return partial(function, re.compile(format_pattern, re.DOTALL)) if name == "format" else verifier
