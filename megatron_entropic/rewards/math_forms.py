r"""One writing of a mathematical answer for everybody: the verifier, the reader whose answers are counted as votes, and
the driver, which judges equal answers once.

    \$ 1{,}234.50 --> 1,234.50      0.1\overline{6} --> \frac{16-1}{90}      \forall, \ldots --> compared as written

Imports no computer algebra, so that reading an answer stays quick.
"""

from __future__ import annotations

import re
from fractions import Fraction

# Sizes of brackets and spaces are no part of a value, nor are dollar signs, of mathematics or of money.
_DROPPED = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|\\[,;:!> ]|\\q?quad(?![a-zA-Z])|~|\\displaystyle(?![a-zA-Z])|\s"
)
_SPELLINGS = (
    (re.compile(r"\\?\$"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:le)(?![a-zA-Z])|\u2264"), r"\\leq "),
    (re.compile(r"\\(?:ge)(?![a-zA-Z])|\u2265"), r"\\geq "),
    (re.compile(r"\\(?:dots[cbmio]?|ldots|cdots|hdots)(?![a-zA-Z])|\u2026|\.\.\.+"), r"\\ldots "),
    (re.compile(r"\u2200"), r"\\forall "),
    (re.compile(r"\u2203"), r"\\exists "),
    (re.compile(r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}|\u2205"), r"\\emptyset "),
    (re.compile(r"\u221e"), r"\\infty "),
    (re.compile("\N{MINUS SIGN}"), "-"),
)
_LEADING_ZEROS = re.compile(r"(?<![\w.,}])0+(?=\d)")
# math-verify drops the first two without a word, and reads the last two as products or sums of their parts.
_AS_WRITTEN = re.compile(r"\\ldots|\\(?:forall|exists|nexists)(?![a-zA-Z])|\d\.\d+\.\d|(?<![\w^{}\\.,])[\d.,]*\d\s+\d")

_GROUPED_BY_SPACES = re.compile(r"(?<![\d.,\\])\d{1,3}(?:(?:\s|\\,)\d{3})+(?![\d])")
_MIXED = re.compile(r"(?<![\d.,/])(\d+)\s+(\d+)/(\d+)(?!\d)")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")
_APART = "\N{MIDDLE DOT}"
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}")
_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d*)?)[eE]([+-]?\d{1,9})")
_PLAIN = re.compile(r"([+-]?)(\d+|\d{1,3}(?:,\d{3})+)?(\.\d+)?")
_PLAIN_FRACTION = re.compile(r"([+-]?)(?:\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}|(\d+)/(\d+))")
_DIGITS = 1000
"""More than a person writes; Python's own limit for reading an integer is 4,300."""


def normalised(answer: str) -> str:
    """What two writings of the same answer have in common, as far as that can be told without parsing them."""
    answer = _BETWEEN_DIGITS.sub(_APART, _spelled(answer))
    answer = _LEADING_ZEROS.sub("", _DROPPED.sub("", answer))
    return answer.removesuffix(".") or answer


def prepared(answer: str) -> str:
    """The answer in a spelling that math-verify understands, with its spaces."""
    answer = _REPEATING.sub(_repeating, _spelled(answer))
    scientific = _SCIENTIFIC.fullmatch(answer)
    return rf"{scientific.group(1)} \times 10^{{{scientific.group(2)}}}" if scientific else answer


def compared_as_written(answer: str) -> bool:
    """Whether a prepared answer says something that would be lost in parsing: ellipses, quantifiers, odd numbers."""
    return _AS_WRITTEN.search(answer) is not None


def plain_number(answer: str) -> Fraction | None:
    """The value of a normalised answer that is one integer, decimal or fraction of integers; None for any other."""
    if len(answer) > _DIGITS:
        return None
    if (found := _PLAIN.fullmatch(answer)) and (found.group(2) or found.group(3)):
        return Fraction(found.group(1) + (found.group(2) or "0").replace(",", "") + (found.group(3) or ""))
    if found := _PLAIN_FRACTION.fullmatch(answer):
        above, below = (part for part in found.groups()[1:] if part is not None)
        if int(below):
            return Fraction(int(above), int(below)) * (-1 if found.group(1) == "-" else 1)
    return None


def _spelled(answer: str) -> str:
    """One spelling for what has several, without dollar signs; spaces are kept except within a number."""
    for pattern, spelling in _SPELLINGS:
        answer = pattern.sub(spelling, answer)
    answer = _GROUPED_BY_SPACES.sub(lambda found: re.sub(r"\s|\\,", "", found.group()), answer)
    return _MIXED.sub(r"\1\\frac{\2}{\3}", answer).strip()


def _repeating(found: re.Match[str]) -> str:
    """0.1\\overline{6} is (16 - 1) / 90."""
    whole, fixed, repeated = found.groups()
    nines = "9" * len(repeated) + "0" * len(fixed)
    numerator = int((whole or "0") + fixed + repeated) - int((whole or "0") + fixed)
    return rf"\frac{{{numerator}}}{{{nines}}}"
