r"""Units of measurement at the end of a mathematical answer: compared where both answers name one, ignored otherwise.

    5 \text{ cents}, \$0.05 --> 5 cents are 0.05 dollars      5^\circ C, 5^\circ F --> 5 C are not 5 F
    5 \text{ km}, 5 --> the same number                       5 widgets, 6 gadgets --> not units that are known here

A unit that is not in the table is left to math-verify, which drops it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Unit:
    """A unit of measurement: a value in it, times `factor`, plus `offset`, is the value in its dimension's own unit."""

    dimension: str
    factor: Fraction
    offset: Fraction = Fraction(0)
    exponent: int = 1

    def measures_as(self, other: Unit) -> bool:
        """Whether values in both units can be compared at all."""
        return (self.dimension, self.exponent) == (other.dimension, other.exponent)

    def converted(self, number: str) -> str:
        """LaTeX of the value of `number`, given in this unit, in its dimension's own unit."""
        factor = self.factor**self.exponent
        scaled = rf"\left({number}\right)\cdot\frac{{{factor.numerator}}}{{{factor.denominator}}}"
        return scaled + (rf"-\frac{{{-self.offset.numerator}}}{{{self.offset.denominator}}}" if self.offset else "")


# Spellings: the dimension, what one of it is in the dimension's own unit, and where its zero lies. Without what may
# mean something else: pounds of money, degrees of an angle.
_TABLE = (
    ("mm|millimet(?:er|re)s?", "length", "0.001", "0"),
    ("cm|centimet(?:er|re)s?", "length", "0.01", "0"),
    ("m|met(?:er|re)s?", "length", "1", "0"),
    ("km|kilomet(?:er|re)s?", "length", "1000", "0"),
    ("in|inch(?:es)?", "length", "0.0254", "0"),
    ("ft|foot|feet", "length", "0.3048", "0"),
    ("yd|yards?", "length", "0.9144", "0"),
    ("mi|miles?", "length", "1609.344", "0"),
    ("mg|milligrams?", "mass", "0.001", "0"),
    ("g|grams?", "mass", "1", "0"),
    ("kg|kilograms?", "mass", "1000", "0"),
    ("lbs?", "mass", "453.59237", "0"),
    ("mL|ml|millilit(?:er|re)s?", "volume", "0.001", "0"),
    ("L|lit(?:er|re)s?", "volume", "1", "0"),
    ("s|secs?|seconds?", "time", "1", "0"),
    ("mins?|minutes?", "time", "60", "0"),
    ("h|hrs?|hours?", "time", "3600", "0"),
    ("days?", "time", "86400", "0"),
    ("weeks?", "time", "604800", "0"),
    ("dollars?", "money", "1", "0"),
    ("cents?", "money", "1/100", "0"),
    ("celsius", "temperature", "1", "0"),
    ("fahrenheit", "temperature", "5/9", "-160/9"),
    ("K|kelvins?", "temperature", "1", "-273.15"),
)
_UNITS = tuple(
    (re.compile(spellings), Unit(dimension, Fraction(factor), Fraction(offset)))
    for spellings, dimension, factor, offset in _TABLE
)
_DEGREES = r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|\N{DEGREE SIGN}|degrees?\s)"
_TEXT = r"\\(?:text|textrm|mathrm|mbox)\s*\{"
# One spelling for signs: those of temperature may stand in a text of their own or around the sign of degrees.
_SIGNS = (
    (
        re.compile(rf"\s*(?:{_TEXT}\s*)?{_DEGREES}\s*(?:{_TEXT})?\s*(?:C|[cC]elsius)(?![a-zA-Z])\s*\}}?\s*$"),
        r" \\text{celsius}",
    ),
    (
        re.compile(rf"\s*(?:{_TEXT}\s*)?{_DEGREES}\s*(?:{_TEXT})?\s*(?:F|[fF]ahrenheit)(?![a-zA-Z])\s*\}}?\s*$"),
        r" \\text{fahrenheit}",
    ),
    (re.compile(r"\s*\N{DEGREE CELSIUS}$"), r" \\text{celsius}"),
    (re.compile(r"\s*\N{DEGREE FAHRENHEIT}$"), r" \\text{fahrenheit}"),
    (re.compile(r"(?<=\d)\s*(?:\\text\s*\{\s*\N{CENT SIGN}\s*\}|\N{CENT SIGN})$"), r" \\text{cents}"),
    (re.compile(r"^([+-]?)\s*\\?\$\s*([^$]+)$"), r"\1\2 \\text{dollars}"),
)
# Of words of one letter, which may be names of variables, those that math-verify takes for units too.
_AT_THE_END = re.compile(
    rf"(?P<number>.*?(?:[\d}})!]|\\pi))\s*(?:\\[ ,;~:]|~)?\s*"
    rf"(?:{_TEXT}\s*(?P<text>[a-zA-Z. ]+?)\.?\s*\}}|(?P<word>[ghms]|[a-zA-Z][a-zA-Z. ]+))"
    r"\s*(?:\^\s*(?:(?P<digit>[23])|\{\s*(?P<braced>[23])\s*\}))?\.?",
    re.DOTALL,
)
_POWERS = (("square ", 2), ("sq ", 2), ("sq. ", 2), ("cubic ", 3), ("cu ", 3))


def split_unit(answer: str) -> tuple[str, Unit | None]:
    """Split an answer into the part before the unit at its end and that unit; without one, into the answer and None."""
    text = answer.strip()
    for pattern, spelling in _SIGNS:
        text = pattern.sub(spelling, text)
    found = _AT_THE_END.fullmatch(text)
    if found is None:
        return answer, None
    name, exponent = (found["text"] or found["word"]).strip(), int(found["digit"] or found["braced"] or 1)
    for word, power in _POWERS:
        if name.lower().startswith(word):
            name, exponent = name[len(word) :].strip(), power
    unit = _unit(name, exponent)
    # In a list it is not said whether all have the unit.
    if unit is None or re.search(r",(?!\d{3})|\\(?:text|mathrm)?\{?\s*(?:and|or)\b", found["number"]):
        return answer, None
    return re.sub(r",(?=\d{3})", "", found["number"].rpartition("=")[2].strip()), unit


def _unit(name: str, exponent: int) -> Unit | None:
    for spellings, unit in _UNITS:
        # Case tells units of one letter apart, and words apart from nothing.
        if spellings.fullmatch(name) or (len(name) > 1 and spellings.fullmatch(name.lower())):
            return Unit(unit.dimension, unit.factor, unit.offset, exponent)
    return None
