r"""Equivalent and different forms of answers, as verdicts of the `math` verifier. docs/verifiers.md says why."""

from __future__ import annotations

import pytest

from megatron_entropic.rewards import build_verifier

math_answer = build_verifier("math")
FORMS = {
    "fractions": [
        (r"\frac{1}{2}", [r"0.5", "1/2", r"\dfrac12", r"\tfrac{2}{4}", "0.50"], ["0.51", "2", r"-\frac12"]),
        (r"-\frac{3}{4}", [r"\frac{-3}{4}", "-0.75"], ["0.75"]),
        (r"\frac{3}{2}", [r"1\frac{1}{2}"], [r"\frac{2}{3}"]),
        ("0.333", [], [r"\frac13"]),
    ],
    "units and money": [
        ("10", [r"10\text{ cm}", r"10\,\mathrm{cm}", "10 cm"], [r"11\text{ cm}"]),
        (r"864 \mbox{ inches}^2", ["864"], ["865"]),
        ("90", [r"90^\circ"], [r"91^\circ"]),
        ("5", [r"\$5", "$5$", r"5\text{ dollars}"], [r"\$6"]),
        (r"\$32{,}348", ["32348", r"\$32,348"], ["32349"]),
    ],
    "percent": [(r"25\%", ["25", "0.25", "25%"], ["26", "0.26"])],
    "grouped digits": [("1000", [r"1{,}000", "1,000", "10^3", "1 000"], ["1", "100"])],
    "sets and lists": [
        (r"\{1,2,3\}", [r"\{3,1,2\}"], [r"\{1,2\}", r"\{1,2,4\}"]),
        ("1,2", ["2,1", r"1 \text{ and } 2", r"x=1\text{ or }x=2"], ["1,3", "1"]),
        ("(1,2)", ["(1, 2)", r"\left(1,2\right)"], ["(2,1)"]),
    ],
    "intervals": [
        ("[0,1)", ["[0, 1)", r"x \in [0,1)"], ["(0,1)", "[0,1]"]),
        (r"(-\infty,1)\cup(2,\infty)", [r"(2, \infty) \cup (-\infty, 1)"], [r"(-\infty,1]\cup(2,\infty)"]),
    ],
    "text": [
        (r"\text{Monday}", ["Monday", r"\text{monday}"], ["Tuesday"]),
        (r"\text{(C)}", ["C", r"\textbf{(C)}"], ["D"]),
    ],
    "roots and constants": [
        (r"2\sqrt{3}", [r"\sqrt{12}", "3.4641016"], ["3.46", r"3\sqrt{2}"]),
        (r"\frac{\sqrt{2}}{2}", [r"\frac{1}{\sqrt{2}}"], [r"\sqrt{2}"]),
        (r"2\pi", [r"\pi \cdot 2", r"2 \pi"], ["6.28", r"\pi"]),
        (r"\infty", [r"\infty"], [r"-\infty"]),
    ],
    "expressions": [
        ("x^2+2x+1", ["(x+1)^2"], ["x^2+2x+2"]),
        ("x=5", ["5"], ["x=6"]),
        ("y=2x+1", ["y = 2x + 1", "2x+1", "2x-y+1=0"], ["y=2x-1"]),
        ("3+4i", ["4i+3"], ["3-4i"]),
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            [r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"],
            [r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"],
        ),
    ],
    "functions": [
        ("1024", ["2^{10}"], ["2^9"]),
        ("3628800", ["10!"], ["9!"]),
        ("3", [r"\log_2 8"], [r"\log_2 4"]),
        ("10", [r"\binom{5}{2}"], [r"\binom{5}{1}"]),
    ],
    # What math-verify does with forms that mean something else to a mathematician.
    "known limits": [("52_8", ["52_{8}", "52"], ["53_8"]), ("3.14", [], [r"\pi"])],
}


@pytest.mark.parametrize("kind", FORMS)
def test_forms(kind: str) -> None:
    for gold, equal, different in FORMS[kind]:
        for answer, reward in [(a, 1.0) for a in equal] + [(a, 0.0) for a in different]:
            assert math_answer(rf"Thus \boxed{{{answer}}}.", gold, {}) == reward, (gold, answer)
