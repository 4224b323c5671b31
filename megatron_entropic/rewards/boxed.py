r"""The last \boxed{} of a text. Apart from its verifier, so that reading an answer loads no computer algebra."""

from __future__ import annotations

import re


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
