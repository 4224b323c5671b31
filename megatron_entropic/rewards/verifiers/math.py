r"""Verifier of mathematical answers, which math-verify compares.

math-verify's own time limits are off: they measure wall time, and turn a slow machine into a silent "wrong". The
process this runs in is killed from outside instead, and that is counted (`pool`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from megatron_entropic.errors import UserError
from megatron_entropic.rewards.answers import last_boxed
from megatron_entropic.rewards.verifiers.math_reading import (
    base,
    compared_as_written,
    gold_answer,
    in_one_order,
    listed,
    normalised,
    plain_number,
    prepared,
    scaled,
)
from megatron_entropic.rewards.verifiers.math_units import split_unit

_ANSWER_CHARACTERS = 300
# LaTeX alone: by default the first number of what cannot be parsed is taken for all of it.
_EXTRACTION = (LatexExtractionConfig(),)

for _name in ("math_verify.parser", "math_verify.grader"):
    # Otherwise every comparison warns that the limits are off.
    logging.getLogger(_name).setLevel(logging.ERROR)


def math_answer(response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    r"""Judge the last \boxed{} of a response by `math_verdict`; a box that is not closed is no answer."""
    return math_verdict(last_boxed(response), ground_truth, extra_info)


def math_verdict(answer: str | None, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    r"""Return 1.0 if the answer equals the ground truth mathematically, else 0.0.

    No answer, or one far longer than any right one, is wrong without being parsed. What nobody can parse, such as a
    time of day, and what parsing would lose, such as ellipses, is compared as written. A unit counts where both name
    one.

    Args:
        answer: the answer as written; None: there is none.
        ground_truth: LaTeX or a number, with or without \boxed{}; or a dictionary with `answer` or `target`.
        extra_info: not used.

    Raises:
        UserError: a ground truth that cannot be read, or not even be compared with itself.
    """
    gold = gold_answer(ground_truth)
    if answer is None or len(answer) > max(_ANSWER_CHARACTERS, 2 * len(gold)):
        return 0.0
    if normalised(gold) == normalised(answer):
        return 1.0
    (gold, gold_unit), (answer, answer_unit) = split_unit(gold), split_unit(answer)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        if not gold_unit.measures_as(answer_unit):
            return 0.0
        gold, answer = gold_unit.converted(gold), answer_unit.converted(answer)
    numbers = plain_number(normalised(gold)), plain_number(normalised(answer))
    if None not in numbers:
        return float(numbers[0] == numbers[1])
    return float(_equal(prepared(gold), prepared(answer)))


def _equal(gold: str, answer: str) -> bool:
    """Whether two prepared answers of different writing are equal."""
    if compared_as_written(gold) or compared_as_written(answer) or _of_different_kinds(gold, answer):
        return False
    if in_one_order(gold) == in_one_order(answer):
        return True
    if scaled(gold) != gold:
        gold, answer = scaled(gold), scaled(answer)
    elif scaled(answer) != answer and _equal(gold, scaled(answer)):
        return True  # otherwise million is a unit that the question asks for, and ignored as all units are
    golds, answers = ([value for value in _parse(text) if not undefined(value)] for text in (gold, answer))
    if not golds:
        raise UserError(f"the ground truth {gold!r} cannot be read as mathematics")
    try:
        if _repeats(gold, golds[0]) or (_repeats(answer, answers[0]) if answers else False):
            return _equal_lists(gold, answer)
        return any(equal(one, other) for one in golds for other in answers)
    except Exception:  # noqa: BLE001  sympy raises anything
        # Whose fault is it? An answer that sympy cannot compare is wrong. A ground truth that it cannot compare even
        # with itself raises here, and the check before training finds it.
        any(equal(one, one) for one in golds)
        return False


def _of_different_kinds(gold: str, answer: str) -> bool:
    """Whether answers that math-verify takes for the same differ in kind: in base, or a set and a tuple or interval."""
    bases = base(gold), base(answer)
    if None not in bases and bases[0] != bases[1]:
        return True
    kinds = [
        (text.startswith(r"\{") and "," in text, re.fullmatch(r"\([^()]*\)", text) is not None)
        for text in (gold, answer)
    ]
    return kinds in ([(True, False), (False, True)], [(False, True), (True, False)])


def _repeats(text: str, value: Any) -> bool:
    """Whether a list names a value twice, which the set that it is parsed as does not show."""
    if isinstance(value, sympy.Equality):
        value = value.rhs
    return isinstance(value, sympy.FiniteSet) and len(listed(text)) > len(value.args)


def _equal_lists(gold: str, answer: str) -> bool:
    """Whether two lists have the same values equally often; for a ground truth in braces, whether they are one set."""
    golds, answers = ([_parse(part)[0] for part in listed(text)] for text in (gold, answer))
    if gold.startswith(r"\{"):
        return equal(sympy.FiniteSet(*golds), sympy.FiniteSet(*answers))
    return _matched(golds, answers, ordered=False)


def _parse(latex: str) -> list[Any]:
    """Parse LaTeX into its value, where that is possible, and the text that was parsed."""
    parsed: list[Any] = parse(rf"\boxed{{{latex}}}", _EXTRACTION, parsing_timeout=None, raise_on_error=True)
    return parsed


# Whether two parsed answers are equal: numbers exactly, what consists of parts part by part, the rest by math-verify.
#
# math-verify compares decimals after rounding to six places and differences after dropping what is small, so that 1e-7
# equals 2e-7, and 1/1990! equals 1/1992!. Here numbers are fractions of integers wherever they are rational, and
# relative differences decide where they are not.

_LARGEST_BITS = 1_000_000
"""Most bits of a numerator or denominator: 300,000 decimal digits, computed in milliseconds."""
_LARGEST_FACTORIAL = 20_000
_DIGITS = 60
_EXACT = sympy.Float("1e-40", 50)
_ROUNDED = sympy.Float("3.5e-7", 50)
"""Relative difference up to which a decimal stands for an irrational number: 1.414214 for the root of 2, 3.4641 for
none. Decimals that are parts of an irrational number are exact: the root of 2.0000001 is another one."""

_Ratio = tuple[int, int]
"""Numerator and denominator, not reduced: reducing large ones takes longer than everything else."""


class TooLarge(Exception):
    """A number would take too long to write down."""


def equal(gold: Any, answer: Any) -> bool:
    """Whether two parsed answers are equal; one that cannot be parsed is a string.

    Raises:
        Exception: whatever sympy and math-verify raise about things that they cannot compare.
    """
    if isinstance(gold, str) or isinstance(answer, str):
        return bool(gold == answer)
    try:
        return _equal_values(gold, answer)
    except TooLarge:
        return bool(gold == answer)


def undefined(value: Any) -> bool:
    """Whether a parsed answer is no value at all, as 1/0 is."""
    return not isinstance(value, str) and bool(getattr(value, "has", lambda *_: False)(sympy.nan, sympy.zoo))


def _equal_values(gold: Any, answer: Any) -> bool:
    parts = _parts(gold, answer)
    if parts is not None:
        return _matched(*parts, ordered=not isinstance(gold, sympy.FiniteSet))
    gold, answer = _with_imaginary_unit(gold, answer)
    if _is_number(gold) and _is_number(answer):
        if _in_percent(gold) == _in_percent(answer):
            return _same_number(_meanings(gold)[0], _meanings(answer)[0])
        return any(_same_number(one, other) for one in _meanings(gold) for other in _meanings(answer))
    return _by_math_verify(gold, answer)


def _parts(gold: Any, answer: Any) -> tuple[Sequence[Any], Sequence[Any]] | None:
    """Parts of two values of the same kind; None if they are of different kinds, or of one piece."""
    if isinstance(gold, sympy.FiniteSet) and isinstance(answer, sympy.FiniteSet):
        # Elements that are relations (x = 1 or x = 2) keep math-verify's rules for names.
        if any(isinstance(part, sympy.core.relational.Relational) for part in (*gold.args, *answer.args)):
            return None
        return gold.args, answer.args
    if isinstance(gold, sympy.Tuple) and isinstance(answer, sympy.Tuple):
        return gold.args, answer.args
    if isinstance(gold, sympy.Interval) and isinstance(answer, sympy.Interval):
        flags = [(side.left_open, side.right_open) for side in (gold, answer)]
        return ((gold.start, gold.end), (answer.start, answer.end)) if flags[0] == flags[1] else ((1,), (2,))
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return (gold.flat(), answer.flat()) if gold.shape == answer.shape else ((1,), (2,))
    return None


def _matched(gold: Sequence[Any], answer: Sequence[Any], *, ordered: bool) -> bool:
    if len(gold) != len(answer):
        return False
    if ordered:
        return all(
            _equal_values(sympy.sympify(one), sympy.sympify(other)) for one, other in zip(gold, answer, strict=True)
        )
    left = list(answer)
    for one in gold:
        found = next((i for i, other in enumerate(left) if _equal_values(one, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _is_number(value: Any) -> bool:
    """Whether a value is one finite number, however it is written."""
    return (
        isinstance(value, sympy.Expr)
        and not value.free_symbols
        and not value.has(sympy.oo, -sympy.oo, sympy.core.function.AppliedUndef)
    )


def _with_imaginary_unit(gold: Any, answer: Any) -> tuple[Any, Any]:
    """The two values with the imaginary unit for the symbol i, where that is their only symbol."""
    values = (gold, answer)
    if not all(isinstance(value, sympy.Expr) for value in values):
        return values
    symbols = gold.free_symbols | answer.free_symbols
    if {symbol.name for symbol in symbols} != {"i"}:
        return values
    return tuple(value.xreplace(dict.fromkeys(symbols, sympy.I)) for value in values)


def _in_percent(value: sympy.Expr) -> bool:
    return bool(value.has(sympy.UnevaluatedExpr))


def _meanings(value: sympy.Expr) -> list[sympy.Expr]:
    """Values that a number can stand for: 25 % is 25 to some and 0.25 to others."""
    # Both are right, unless the other side is in percent too.
    percent = sympy.UnevaluatedExpr(sympy.Rational(1, 100))
    if not _in_percent(value):
        return [value]
    return [value.xreplace({percent: sympy.Integer(1)}), value.xreplace({percent: sympy.Rational(1, 100)})]


def _same_number(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    one, other = _ratio(gold), _ratio(answer)
    if one is not None and other is not None:
        return one[0] * other[1] == other[0] * one[1]
    decimal = any(ratio and value.has(sympy.Float) for ratio, value in ((one, gold), (other, answer)))
    tolerance = _ROUNDED if decimal else _EXACT
    values = [_without_decimals(value).doit().evalf(_DIGITS) for value in (gold, answer)]
    difference, sizes = abs(values[0] - values[1]), [abs(value) for value in values]
    if any(size.is_infinite for size in sizes):
        return bool(values[0] == values[1])
    if all(size.is_Number and size.is_finite for size in (difference, *sizes)) and max(sizes) > _EXACT:
        return bool(difference <= tolerance * max(sizes))
    # Sums that nearly cancel, and what sympy has no digits of: by rearrangement, if at all.
    return _by_math_verify(gold, answer)


def _by_math_verify(gold: Any, answer: Any) -> bool:
    exact = [_without_decimals(value) for value in (gold, answer)]
    options = {"numeric_precision": _DIGITS, "allow_set_relation_comp": True}
    return bool(verify(*exact, **options, timeout_seconds=None, raise_on_error=True))


def _ratio(value: sympy.Expr) -> _Ratio | None:
    """Numerator and denominator of a value; None if it is not made of rational numbers alone.

    Raises:
        TooLarge: it has more than `_LARGEST_BITS`.
    """
    if isinstance(value, sympy.Rational):
        return int(value.p), int(value.q)
    if isinstance(value, sympy.Float):
        return _ratio(_decimal(value))
    step = _STEPS.get(value.func)
    if step is None:
        return None
    parts = [_ratio(part) for part in value.args]
    return None if any(part is None for part in parts) else step([part for part in parts if part is not None])


def _sum(parts: list[_Ratio]) -> _Ratio:
    above, below = 0, 1
    for p, q in parts:
        above, below = _bounded(above * q + p * below, below * q)
    return above, below


def _product(parts: list[_Ratio]) -> _Ratio:
    above, below = 1, 1
    for p, q in parts:
        above, below = _bounded(above * p, below * q)
    return above, below


def _power(parts: list[_Ratio]) -> _Ratio | None:
    (p, q), (exponent, divisor) = parts
    if exponent % divisor or (exponent < 0 and not p):
        return None
    exponent //= divisor
    if exponent < 0:
        p, q, exponent = (q if p > 0 else -q), abs(p), -exponent
    if abs(p) <= 1 and q == 1:
        exponent = min(exponent, 2 - exponent % 2)
    if max(p.bit_length(), q.bit_length()) * exponent > _LARGEST_BITS:
        raise TooLarge
    return p**exponent, q**exponent


def _factorial(parts: list[_Ratio]) -> _Ratio | None:
    ((number, divisor),) = parts
    if divisor != 1 or number < 0:
        return None
    if number > _LARGEST_FACTORIAL:
        raise TooLarge
    return int(sympy.factorial(number)), 1


def _bounded(above: int, below: int) -> _Ratio:
    if max(above.bit_length(), below.bit_length()) > _LARGEST_BITS:
        raise TooLarge
    return above, below


_STEPS: dict[Any, Callable[[list[_Ratio]], _Ratio | None]] = {
    sympy.Add: _sum,
    sympy.Mul: _product,
    sympy.Pow: _power,
    sympy.factorial: _factorial,
    sympy.UnevaluatedExpr: lambda parts: parts[0],
}


def _without_decimals(value: Any) -> Any:
    """The value with its decimals as the fractions that were written."""
    atoms = getattr(value, "atoms", None)
    decimals = atoms(sympy.Float) if atoms else set()
    return value.xreplace({one: _decimal(one) for one in decimals}) if decimals else value


def _decimal(value: sympy.Float) -> sympy.Rational:
    # Fifteen digits are what was written: a Float of 53 bits shows more than that.
    return sympy.Rational(str(value))
