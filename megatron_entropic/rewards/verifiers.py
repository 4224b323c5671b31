"""The verifiers by name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

Verifier = Callable[[str, Any, Mapping[str, Any]], float]
"""(response text, ground truth, extra_info of the row) -> reward. What it raises is counted as a verifier error."""

BUILT_IN = {
    "countdown": "megatron_entropic.rewards.countdown:countdown",
    "exact": "megatron_entropic.rewards.exact:exact",
    "math": "megatron_entropic.rewards.math_answer:math_answer",
}

INSTANT = frozenset({"countdown", "exact"})
"""Built-in verifiers whose time is bounded and far below that of asking another process."""


def build_verifier(name: str) -> Verifier:
    """The verifier called `name`: a built-in one, or `module:function`, also from the current directory.

    Raises:
        ValueError: no such verifier, or its module does not import.
    """
    target = BUILT_IN.get(name, name)
    module_name, separator, function_name = target.partition(":")
    if not separator:
        raise ValueError(f"no verifier {name!r}: expected one of {', '.join(BUILT_IN)}, or module:function")
    # An installed command does not look into the current directory; people keep their own verifiers there.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"verifier {name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"verifier {name!r}: the module {module_name} has no function {function_name!r}")
    verifier: Verifier = function
    return verifier
