r"""Ways to find the answer in a response: `reward.answer`, a row of `config.names.ANSWERS` and a function for each.

"So she has 5 + 7 = \boxed{12} apples."          --> boxed          12
"5 + 7 = 12, so she has 12 apples."              --> last_number    12
" 12\n13 + 4 ="                                  --> first_line     12
"Answer: 12\nQuestion: 3 + 4", Answer: (\S+)     --> regex          12
"12"                                             --> whole_response 12

All but `regex`, whose pattern is somebody's own, take time linear in the length of the response.
"""

from __future__ import annotations

import re
from collections import deque

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_FRACTION = r"\\[dt]?frac\{[0-9]+\}\{[0-9]+\}"
# A sign stands directly before its number and behind nothing that it could be subtracted from: "is -3" and "=-3", but
# the 3 of "5-3" and "5 - 3" has none. A digit behind a letter (x2, H2O) belongs to a name.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])([-+\N{MINUS SIGN}])\\?\$?)?"
    rf"(?<![\w])({_FRACTION}|(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+|[eE][-+]?[0-9]+(?!\w))?(?:\s?\\?%)?)"
)


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{} of a text, braces balanced; None without one or if it is not closed."""
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


def last_number(text: str) -> str | None:
    r"""The last number of a text: an integer with or without commas, a decimal, a fraction, with its sign and percent.

    Currencies are left off, and of a mixed number (5 3/4) the fraction alone is read.
    """
    found = _last_match(_NUMBER, text)
    if found is None:
        return None
    return ("-" if found.group(1) in ("-", "\N{MINUS SIGN}") else "") + found.group(2)


def first_line(text: str) -> str | None:
    """The first line that is not blank, without white space around it."""
    found = re.search(r"\S[^\r\n]*", text)
    return found and found.group().rstrip()


def by_pattern(pattern: re.Pattern[str], text: str) -> str | None:
    """The first group of the last match that took part in it, or the whole match where the pattern has no group.

    None where nothing matches, or what matches is empty.
    """
    found = _last_match(pattern, text)
    if found is None:
        return None
    groups = found.groups() if pattern.groups else (found.group(),)
    return next((group.strip() for group in groups if group is not None), None) or None


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = deque(pattern.finditer(text), maxlen=1)
    return found[0] if found else None


def whole_response(text: str) -> str | None:
    """The whole response, which is the answer."""
    return text


# A response that says nothing but an answer: what decides of a response, and what ground truths are tried with.


def in_box(answer: str) -> str:
    r"""A response of an answer in \boxed{}. The blank keeps a backslash at its end from escaping the brace."""
    return rf"\boxed{{{answer} }}"


def as_it_is(answer: str) -> str:
    """The answer as a response, since nothing need be around it for it to be found."""
    return answer
