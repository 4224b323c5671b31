r"""One writing of a mathematical answer for everybody: the verifier, the reader whose answers are counted as votes, and
the driver, which judges equal answers once.

    \$ 1{,}234.50 --> 1,234.50      0.1\overline{6} --> \frac{16-1}{90}      \forall, \ldots --> compared as written

Imports no computer algebra, so that reading an answer stays quick.
"""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction
from typing import Any

from megatron_entropic.errors import UserError
from megatron_entropic.rewards.answers import last_boxed
from megatron_entropic.rewards.verifier import Trial

_TEXT = r"\\(?:text|textrm|mathrm|mbox)\s*\{"
# Sizes of brackets and spaces are no part of a value, nor are signs of mathematics or of money.
_DROPPED = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|\\[,;:!> ]|\\q?quad(?![a-zA-Z])|~|\\displaystyle(?![a-zA-Z])|\s"
)
_SPELLINGS = (
    (re.compile(r"\\?\$"), ""),
    (
        re.compile(
            rf"{_TEXT}\s*[\u20ac\u00a3\u00a5\u20b9]\s*\}}|[\u20ac\u00a3\u00a5\u20b9]|{_TEXT}\s*(?:USD|EUR|GBP)\s*\}}(?=\s*[\d.])"
        ),
        "",
    ),
    (
        re.compile(rf"(?<=\d)\s*(?:\\[ ,;~])?\s*(?:{_TEXT}\s*)?([aApP])(?:\.\s?)?[mM]\.?(?![a-zA-Z])\s*\}}?"),
        lambda found: f" {found.group(1).lower()}m",
    ),
    (re.compile(r"\\(?:land|wedge)(?![a-zA-Z])|\u2227"), r"\\wedge "),
    (re.compile(r"\\(?:lor|vee)(?![a-zA-Z])|\u2228"), r"\\vee "),
    (re.compile(r"\\(?:lnot|neg)(?![a-zA-Z])|\u00ac"), r"\\neg "),
    (re.compile(r"\\pmod\s*(\w)"), r"\\pmod{\1}"),
    (re.compile(r"_\{(\w)\}"), r"_\1"),
    # 1'000'000 is a number, other strokes are derivatives, feet or minutes.
    (re.compile(r"(?<![\d'])\d{1,3}(?:'\d{3})+(?![\d'])"), lambda found: found.group().replace("'", "")),
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
# Each with what math-verify makes of it.
_AS_WRITTEN = re.compile(
    "|".join(
        (
            r"\\ldots|\\(?:forall|exists|nexists)(?![a-zA-Z])",  # dropped
            r"'|\\prime(?![a-zA-Z])",  # dropped: f' is f, 5'10'' is 510
            r"\d [ap]m(?![a-zA-Z])",  # dropped: 10 am is 10 pm
            r"\d\.\d+\.\d|(?<![\w^{}\\.,])[\d.,]*\d\s+\d",  # products or sums of their parts
            r"\d\s*:\s*\d+\s*:\s*\d",  # quotients: 1:2:3 is 1:3:2
            # The first number alone: 3 ft 4 in is 3 ft 5 in.
            rf"\d\s*(?:{_TEXT}(?!\s*(?:or|and)\s*\}})[^{{}}]*\}}|(?!(?:or|and)\b)(?<=\s)[a-z]{{2,}})\s*\d",
        )
    )
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=[\d}}])\s*(?:\\[ ,;~])?\s*(?:{_TEXT}\s*)?({'|'.join(_SCALES)})s?(?![a-z])\s*(\}}?)")
_BASE = re.compile(r"[0-9A-Fa-f]_(?:(\d)(?!\d)|\{(\d+)\})$")
_UNIT_WORDS = re.compile(r"(?<=[\d}])\s+([a-z]{4,}(?:\s+[a-z]+)*)$")
_MIXED_PERCENT = re.compile(r"(?<![\d.^_}])(\d+)\\frac\{(\d+)\}\{(\d+)\}(?=\s*\\?%)")
_DOUBLE_FACTORIAL = re.compile(r"(?<![\w.)}])(\d{1,3})!!(?!!)")
_DEGREES = re.compile(
    r"\\(sin|cos|tan|cot|sec|csc)\s*(?:\{|(?:\\left)?\()?\s*(\d+(?:\.\d+)?)\s*\^\s*"
    r"(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})\s*(?:(?:\\right)?\)|\})?"
)

_GROUPED_BY_SPACES = re.compile(r"(?<![\d.,\\])\d{1,3}(?:(?:\s|\\,)\d{3})+(?![\d])")
_MIXED = re.compile(r"(?<![\d.,/])(\d+)\s+(\d+)/(\d+)(?!\d)")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")
_APART = "\N{MIDDLE DOT}"
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}")
_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d*)?)[eE]([+-]?\d{1,9})")
_PLAIN = re.compile(r"([+-]?)(\d+|\d{1,3}(?:,\d{3})+)?(\.\d+)?")
_PLAIN_FRACTION = re.compile(r"([+-]?)(?:\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}|(\d+)/(\d+))")
# Primes, since no ground truth but themselves equals them by chance.
_ANOTHER_NUMBER = ("7919", "7907")
_CONNECTIVES = tuple(
    (re.compile(rf"\\{name}(?![a-zA-Z])"), sign)
    for name, sign in (
        ("cup", "\N{UNION}"),
        ("cap", "\N{INTERSECTION}"),
        ("wedge", "\N{LOGICAL AND}"),
        ("vee", "\N{LOGICAL OR}"),
    )
)
_COMMUTATIVE = re.compile("[" + "".join(sign for _, sign in _CONNECTIVES) + "]")
_BETWEEN_PARTS = re.compile(rf"[,;]|{_TEXT}\s*(?:and|or)\s*\}}|\b(?:and|or)\b")
_DIGITS = 1000
"""Most characters of an answer that is read as a plain number; Python's own limit for reading an integer is 4,300."""


def normalised(answer: str) -> str:
    """One writing for all writings of an answer, as far as it can be found without parsing them."""
    answer = _BETWEEN_DIGITS.sub(_APART, _spelled(answer))
    answer = _LEADING_ZEROS.sub("", _DROPPED.sub("", answer))
    return answer.removesuffix(".") or answer


def prepared(answer: str) -> str:
    """The answer in a spelling that math-verify understands, with its spaces."""
    answer = _REPEATING.sub(_repeating, _spelled(answer))
    if scientific := _SCIENTIFIC.fullmatch(answer):
        return rf"{scientific.group(1)} \times 10^{{{scientific.group(2)}}}"
    answer = _UNIT_WORDS.sub(r"\\text{ \1}", answer)
    answer = _MIXED_PERCENT.sub(_improper, answer)
    answer = _DOUBLE_FACTORIAL.sub(lambda found: str(math.prod(range(int(found.group(1)), 0, -2))), answer)
    return _DEGREES.sub(r"\\\1\\left(\\frac{\2\\pi}{180}\\right)", answer)


def compared_as_written(answer: str) -> bool:
    """Whether a prepared answer says something that would be lost in parsing: ellipses, quantifiers, odd numbers."""
    return _AS_WRITTEN.search(answer) is not None


def base(answer: str) -> str | None:
    """Base that a prepared answer names, as 2 in 101_2; None if it names none."""
    found = _BASE.search(answer)
    return found and (found.group(1) or found.group(2))


def scaled(answer: str) -> str:
    r"""A prepared answer with 5 \text{ million} as 5 \cdot 10^6; the same one if there is no such word in it."""
    return _SCALE.sub(lambda found: rf"\cdot 10^{{{_SCALES[found.group(1)]}}}" + _rest(found.group()), answer)


def listed(answer: str) -> list[str]:
    r"""The parts of a prepared answer that is a list, with or without the braces of a set and a name before it."""
    if answer.count("=") == 1:
        answer = answer.rpartition("=")[2].strip()
    return _split(answer.removeprefix(r"\{").removesuffix(r"\}"), _BETWEEN_PARTS)[::2]


def in_one_order(answer: str) -> str:
    r"""A prepared answer with the operands of \cup, \cap, \wedge or \vee sorted: B \cup A is A \cup B.

    For comparing, not for parsing. Different operators side by side stay as they are: which of them binds is not said.
    """
    for name, sign in _CONNECTIVES:
        answer = name.sub(sign, answer)
    answer = _without_brackets(_DROPPED.sub("", answer))
    parts = _split(answer, _COMMUTATIVE)
    if len(set(parts[1::2])) != 1:
        return answer
    operands: list[str] = []
    for operand in map(in_one_order, parts[::2]):
        inner = _split(_without_brackets(operand), _COMMUTATIVE)
        operands += inner[::2] if set(inner[1::2]) == {parts[1]} else [operand]
    return f"({parts[1].join(sorted(operands))})"


def plain_number(answer: str) -> Fraction | None:
    """Value of a normalised answer that is one integer, decimal or fraction of integers; None for any other."""
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
    """The answer with one spelling for everything that has several, without dollar signs."""
    # Spaces are kept except within a number.
    for pattern, spelling in _SPELLINGS:
        answer = pattern.sub(spelling, answer)
    answer = _GROUPED_BY_SPACES.sub(lambda found: re.sub(r"\s|\\,", "", found.group()), answer)
    return _MIXED.sub(r"\1\\frac{\2}{\3}", answer).strip()


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts of a text and between them its separators, those within brackets not counted."""
    parts, depth, start = [], 0, 0
    for found in re.finditer(rf"(?P<bracket>[(\[{{])|[)\]}}]|(?P<separator>{separator.pattern})", text):
        if not found["separator"]:
            depth += 1 if found["bracket"] else -1
        elif depth == 0:
            parts += [text[start : found.start()], found["separator"]]
            start = found.end()
    return [*parts, text[start:]]


def _without_brackets(text: str) -> str:
    """The text without round brackets around the whole of it, unless it is a pair or an interval."""
    while text.startswith("(") and text.endswith(")"):
        depths = list(itertools.accumulate((char in "([{") - (char in ")]}") for char in text))
        if 0 in depths[:-1] or len(_split(text[1:-1], _BETWEEN_PARTS)) > 1:
            break
        text = text[1:-1]
    return text


def _rest(word: str) -> str:
    r"""Beginning of the unit that is left of \text{ million dollars}, its command; empty if no unit is left."""
    return r"\text{" if "{" in word and not word.endswith("}") else ""


def _improper(found: re.Match[str]) -> str:
    whole, above, below = map(int, found.groups())
    return rf"\frac{{{whole * below + above}}}{{{below}}}"


def _repeating(found: re.Match[str]) -> str:
    """Fraction of a repeating decimal: 0.1\\overline{6} is (16 - 1) / 90."""
    whole, fixed, repeated = found.groups()
    nines = "9" * len(repeated) + "0" * len(fixed)
    numerator = int((whole or "0") + fixed + repeated) - int((whole or "0") + fixed)
    return rf"\frac{{{numerator}}}{{{nines}}}"


# Ground truths, votes and trials. Apart from the verifier, so that reading an answer loads no computer algebra.


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


def math_vote(answer: str) -> str | None:
    """The answer in the writing that votes count; None if nothing is left of it."""
    return normalised(answer) or None


def math_trials(ground_truth: Any) -> list[Trial]:
    r"""Trials of a ground truth: as an answer it must be right, another number wrong, and neither may be an error.

    Nor may the ground truth with its digits changed be one, which in training would give wrong answers the mean reward
    of their group. Equal strings are right whether math-verify can parse them or not; other forms of such an answer
    cannot be recognised then.

    Raises:
        UserError: the ground truth is empty.
    """
    gold = gold_answer(ground_truth)
    another = next(number for number in _ANOTHER_NUMBER if number not in gold)
    found = [Trial(gold, "right"), Trial(another, "wrong")]
    changed = re.sub(r"\d", lambda digit: str((int(digit.group()) + 1) % 10), gold)
    return found if changed == gold else [*found, Trial(changed, "verdict")]
