"""Text of models, data and errors as it may be shown: nothing in it acts on a terminal or changes how a page reads."""

from __future__ import annotations

import re

# C0 controls but tab and newline, DEL and C1 (a terminal obeys them), marks that reverse the direction of what
# follows, and lone surrogates, which UTF-8 cannot hold.
_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PICTURES, _DELETE = 0x2400, 0x7F


def printable(text: str) -> str:
    """The text with a visible sign for each character that acts: ESC becomes U+241B, others their escape."""
    return _ACTS.sub(_sign, text)


def shortened(text: str, characters: int) -> str:
    """The text, or if it is longer than `characters` its two ends with a note of how much is left out between them."""
    # A line of a megabyte would hide what is around it.
    hidden = len(text) - characters
    if hidden <= 0:
        return text
    first, last = characters // 2, characters - characters // 2
    return f"{text[:first]}\n[... {hidden:,} characters ...]\n{text[-last:]}"


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(_PICTURES + code)
    return "\u2421" if code == _DELETE else f"\\u{code:04x}"
