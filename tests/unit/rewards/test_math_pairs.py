r"""Right and wrong answers of many kinds, each worked out by hand: the verdict is exact, and never an error.

Numbers that are close and not equal, huge and tiny ones, and what parsing would lose are the point of this table;
`test_math_forms` has the forms that people write.
"""

from __future__ import annotations

import pytest

from megatron_entropic.rewards import build_reader, build_verifier
from megatron_entropic.rewards.answers import in_box
from megatron_entropic.rewards.verifier import judge, trials

math_answer = build_verifier("math")
# Kind: (ground truth, right answers, wrong answers).
PAIRS = {
    "apart and together": [
        ("3", [r"\log_2 8"], []),
        (r"\frac12", [r"\frac 1 2", r"\dfrac 12"], [r"\frac 1 3"]),
        ("12", [], ["1 2"]),
    ],
    "fractions": [
        (r"\frac{7}{12}", ["7/12", r"\dfrac{14}{24}", r"\tfrac7{12}"], ["0.583333", r"\frac{12}{7}", r"-\frac{7}{12}"]),
        (r"-\frac{1}{3}", [r"\frac{-1}{3}", r"\frac{1}{-3}", r"-0.\overline{3}"], [r"\frac13", "-0.3333"]),
        (r"2\frac{3}{4}", [r"\frac{11}{4}", "2.75", "2 3/4", "11/4"], [r"\frac{23}{4}", "23/4"]),
        ("53/4", ["13.25"], ["5 3/4"]),
    ],
    "percent": [
        (r"12.5\%", ["12.5", "0.125", r"\frac{1}{8}", "12.5 percent"], ["1.25", "12.6"]),
        (r"0.3\%", ["0.003", r"\frac{3}{1000}"], [r"0.4\%", r"3\%", "0.03"]),
        (r"50\%", [r"50.0\%", "0.5"], [r"0.5\%", r"5000\%"]),
        (r"33\frac13\%", [r"\frac{100}{3}\%", r"\frac13"], [r"12\frac13\%", r"33\%", r"\frac13\%"]),
    ],
    "values named twice": [
        ("1,2,2", ["2,1,2", "1, 2, 2.0", r"\{1,2,2\}", r"1,2\text{ and }2"], ["1,2", "1,1,2", "1,2,2,2", r"\{1,2\}"]),
        ("1,2", ["2,1", r"1\text{ and }2"], ["1,2,2", "1,1,2"]),
        ("x=1,2,2", ["1,2,2"], ["1,2"]),
        ("a,b,b", ["b,a,b"], ["a,b"]),
        (r"\{1,2\}", ["1,2,2"], ["1,2,3"]),
    ],
    "in another order": [
        (r"A\cup B", [r"B\cup A", r"\left(B \cup A\right)"], [r"A\cap B", r"A\cup C", r"A\cup B\cup C"]),
        (r"A\cap(B\cup C)", [r"(C\cup B)\cap A"], [r"A\cup(B\cap C)", r"A\cap B\cup C"]),
        (r"A\cup B\cup C", [r"C\cup(B\cup A)", r"(A\cup C)\cup B"], []),
        (r"\overline{A}\cup B", [r"B\cup\overline{A}"], [r"A\cup\overline{B}"]),
        (r"p\land q", [r"q\land p"], [r"q\lor p"]),
        (r"A\setminus B", [], [r"B\setminus A"]),
        (r"p\to q", [], [r"q\to p"]),
    ],
    "units of both": [
        (r"5\text{ km}", [r"5000\text{ m}", "5km", r"5\text{ kilometers}"], [r"5\text{ m}", "5 miles", r"5\text{ kg}"]),
        (r"\frac{3}{2}\text{ hours}", ["90 min", "1.5"], ["90 hours", "90", r"1.5\text{ days}"]),
        (r"\sqrt{2}\text{ km}", [r"1000\sqrt{2}\text{ m}"], [r"\sqrt{2}\text{ m}"]),
        (r"x=5\text{ cm}", ["5", "x=5", "0.05 m"], ["5 m"]),
        ("12,500 m", ["12.5 km", "12500"], ["12.5 m"]),
        (
            r"12\text{ cm}^2",
            [r"12\text{ square centimeters}", "12", r"0.0012\text{ m}^{2}"],
            [r"12\text{ cm}", "12 m^2"],
        ),
        (r"3\text{ m/s}", ["3"], ["4"]),
        ("2 hours 30 minutes", [], ["2 hours", "150 hours"]),
        ("3, 4 cm", ["3,4"], ["3,5"]),
    ],
    "temperatures": [
        (
            r"5^\circ C",
            ["5", "5\N{DEGREE SIGN}C", r"5^{\circ}\text{C}", r"5\text{ degrees Celsius}", r"41^\circ F"],
            [r"5^\circ F", "5 \N{DEGREE SIGN}F", r"5\text{ K}", r"41^\circ C"],
        ),
        ("98.6 \N{DEGREE SIGN}F", ["37 \N{DEGREE CELSIUS}", "98.6"], ["98.6 \N{DEGREE CELSIUS}"]),
    ],
    "units": [
        (r"12\text{ km}", ["12", r"12\,\mathrm{km}"], ["13", "120"]),
        (r"3.5\text{ hours}", ["3.5", r"\frac{7}{2}", "3.5 hours"], ["3.6", "35"]),
        (r"3\text{ ft }4\text{ in}", [r"3\text{ ft } 4\text{ in}"], [r"3\text{ ft }5\text{ in}", "3", "34"]),
        (r"2\text{ hours }30\text{ minutes}", [], [r"2\text{ hours }40\text{ minutes}", "2"]),
        ("5'10''", [], ["5'11''", "510"]),
    ],
    "money": [
        (r"\$0.05", [r"5\text{ cents}", "5 cents", "5\N{CENT SIGN}", "0.05"], ["5", r"5\text{ dollars}"]),
        ("5 cents", ["5", "$0.05"], [r"\$5", r"50\text{ cents}"]),
        (r"\$1{,}250.50", ["1250.50", "1250.5", r"\$1,250.50", "$1250.5$"], ["1250.05", "1250"]),
    ],
    "other money": [
        ("\u20ac12.50", ["12.5", "\\text{\u20ac}12.5", "\u00a312.50"], ["12.05", "\u20ac12"]),
        (r"\text{USD }100", ["100", r"\$100"], ["10"]),
    ],
    "scales": [
        (
            r"5\text{ million}",
            ["5000000", "5 million", r"5{,}000{,}000", r"\$5\text{ million dollars}", r"5\cdot10^6"],
            [r"5\text{ billion}", r"5\text{ thousand}", "5"],
        ),
        ("5", [r"5\text{ million}"], [r"6\text{ million}"]),
    ],
    "times of day": [
        (r"10:00\text{ AM}", ["10:00 am", r"10:00\text{ a.m.}"], [r"10:00\text{ PM}", "10:01 AM"]),
        ("7 p.m.", [r"7\text{ PM}"], ["7 a.m.", "8 p.m."]),
    ],
    "derivatives": [
        ("f'(x)", [], ["f(x)", "f''(x)"]),
    ],
    "intervals": [
        (r"\left[0,\frac12\right)", ["[0,1/2)", "[0,0.5)"], ["[0,0.5]", "(0,0.5)", "[0,0.6)"]),
        (
            r"(-\infty,-2)\cup(2,\infty)",
            [r"(2,\infty)\cup(-\infty,-2)", r"\left(-\infty,-2\right)\cup\left(2,+\infty\right)"],
            [r"(-\infty,-2]\cup(2,\infty)", "(-2,2)"],
        ),
        ("[10^{-8},1]", ["[0.00000001,1]"], ["[10^{-9},1]", "[0.00000002,1]"]),
    ],
    "sets": [
        (r"\{1,2\}", ["1,2", r"\{2,1\}"], ["(1,2)", "[1,2]"]),
        ("(1,2)", ["1,2"], [r"\{1,2\}"]),
        (r"\{(1,2),(3,4)\}", ["(1,2),(3,4)"], [r"\{(2,1),(3,4)\}"]),
        (r"\{-1,0,1\}", [r"\{0,1,-1\}", "-1,0,1"], [r"\{0,1\}", r"\{-1,0,2\}"]),
        (r"\{\frac12,2\}", [r"\{2,0.5\}", r"\{0.5,2\}"], [r"\{2,0.51\}"]),
        (r"\{10^{-7},1\}", [r"\{1,0.0000001\}"], [r"\{2\cdot10^{-7},1\}"]),
        (r"\emptyset", [r"\varnothing", r"\{\}"], ["0", r"\{1\}"]),
    ],
    "tuples": [
        ("(3,-2)", [r"\left(3,-2\right)", "(3, -2)", "(3.0,-2)"], ["(-2,3)", "(3,2)"]),
        ("(0.0000001,1)", ["(10^{-7},1)"], ["(0.0000002,1)"]),
    ],
    "matrices": [
        (
            r"\begin{pmatrix}1&0\\0&1\end{pmatrix}",
            [r"\begin{bmatrix}1&0\\0&1\end{bmatrix}"],
            [r"\begin{pmatrix}0&1\\1&0\end{pmatrix}", r"\begin{pmatrix}1&0\end{pmatrix}"],
        ),
        (
            r"\begin{pmatrix}\frac12\\3\end{pmatrix}",
            [r"\begin{pmatrix}0.5\\3\end{pmatrix}"],
            [r"\begin{pmatrix}0.5\\4\end{pmatrix}"],
        ),
        (r"\begin{pmatrix}10^{-9}\end{pmatrix}", [], [r"\begin{pmatrix}2\cdot10^{-9}\end{pmatrix}"]),
    ],
    "plus minus": [
        (r"\pm 3", ["-3,3", "3,-3", r"\pm3", r"x=\pm3"], ["3", "-3", r"\pm 4"]),
        (r"1\pm\sqrt{2}", [r"1+\sqrt2,1-\sqrt2"], [r"1+\sqrt{2}", r"1\pm\sqrt{3}"]),
    ],
    "infinities": [
        (r"\infty", [r"+\infty", "\u221e"], [r"-\infty", "0", "10^{100}"]),
        (r"-\infty", [r"-\infty"], [r"\infty", "-10"]),
    ],
    "powers": [
        ("2^{64}", ["18446744073709551616"], ["18446744073709551615", "2^{63}"]),
        ("3^{200}", ["9^{100}"], ["3^{200}+1", "3^{199}"]),
        ("10^{1000000}", ["10^{1000000}"], ["10^{1000001}", "10"]),
        ("10^{10^{10}}", ["10^{10^{10}}"], ["10^{10^{9}}", "1"]),
        ("7^{-30}", [r"\frac{1}{7^{30}}"], ["7^{-31}", r"\frac{1}{7^{29}}"]),
    ],
    "factorials": [
        ("100!", [r"100\cdot 99!"], ["101!", "99!"]),
        (r"\frac{50!}{48!}", ["2450", r"50\cdot 49"], ["2451"]),
        (r"\frac{1}{60!}", [], [r"\frac{1}{61!}", "0"]),
        ("7!!", ["105"], ["5040", "7!", "(7!)!"]),
    ],
    "small": [
        (
            r"3\cdot10^{-15}",
            [r"\frac{3}{10^{15}}", "3e-15", "0.000000000000003"],
            [r"4\cdot10^{-15}", "0", r"3\cdot10^{-16}"],
        ),
        ("10^{-20}x", [], ["10^{-21}x", "0"]),
        (r"0.00001\pi", [r"\frac{\pi}{100000}"], [r"0.00002\pi", "0"]),
    ],
    "text": [
        (r"\text{increasing}", ["increasing", r"\mathrm{increasing}"], [r"\text{decreasing}"]),
        (r"\text{(B)}", ["B", "(B)"], ["(C)", "A"]),
        (r"\text{Yes}", ["yes", r"\text{yes}"], ["No"]),
        (r"\text{Friday, 9 May}", [r"\text{Friday, 9 May}"], [r"\text{Friday, 8 May}", "9"]),
    ],
    "thousands": [
        ("1,234,567", ["1234567", "1{,}234{,}567", "1 234 567", r"1\,234\,567"], ["1,234,568", "1.234567"]),
        ("1234.5", ["1,234.5", r"1\,234.5"], ["12345", "1.2345"]),
    ],
    "degrees": [
        (r"45^\circ", ["45", r"45^{\circ}"], [r"46^\circ", r"54^\circ"]),
        (r"\frac{\pi}{4}", [r"\pi/4"], [r"\frac{\pi}{3}", "45"]),
    ],
    "scientific": [
        (r"6.02\times10^{23}", ["6.02e23", "6.02E+23", r"602\cdot10^{21}"], ["6.03e23", "6.02e22"]),
        (r"1.6\times 10^{-19}", ["1.6e-19", r"16\cdot10^{-20}"], ["1.6e-18", "1.7e-19", "0"]),
    ],
    "ellipses": [
        (
            r"1,3,5,\ldots,99",
            [r"1, 3, 5, \dots, 99", "1,3,5,...,99", "1,3,5,\u2026,99"],
            [r"1,3,5,\ldots,97", "5", "99", r"2,4,6,\ldots,99"],
        ),
        (r"1+2+\cdots+n", [r"1+2+\ldots+n"], [r"1+2+\cdots+2n", "n"]),
        (r"0.1212\ldots", ["0.1212..."], ["0.1212", "0.1313..."]),
    ],
    "quantifiers": [
        (r"\forall x\in\mathbb{R}", ["\u2200 x\\in\\mathbb{R}"], [r"\exists x\in\mathbb{R}", "x"]),
        ("f(n)=1", ["f(n)=1"], [r"\forall n>1, f(n)=1", r"\exists n: f(n)=1"]),
    ],
    "repeating": [
        (r"0.\overline{142857}", [r"\frac17"], ["0.142857", r"\frac16"]),
        (r"0.1\overline{6}", [r"\frac{1}{6}", r"0.1\bar{6}"], ["0.16", r"\frac{1}{7}"]),
    ],
    "roots": [
        (r"\sqrt{50}", [r"5\sqrt2", "7.0710678"], ["7.07", r"5\sqrt3"]),
        (r"\sqrt{2}", ["1.4142136"], [r"\sqrt{2.0000001}", r"1.00000001\sqrt{2}"]),
        (r"\sqrt[3]{16}", [r"2\sqrt[3]{2}"], [r"2\sqrt{2}"]),
    ],
    "logs": [
        (r"\ln 2", [r"\frac{\ln 4}{2}"], [r"\ln 3", "0.69"]),
    ],
    "trig": [
        (r"\cos\frac{\pi}{3}", ["0.5", r"\frac12"], ["0.51"]),
        (r"\frac{\sqrt3}{2}", [r"\sin 60^\circ", r"\cos(30^{\circ})"], [r"\sin 30^\circ", r"\sin 60"]),
    ],
    "inequalities": [
        ("x<2", ["2>x", r"(-\infty,2)"], [r"x\le2", "x>2"]),
        (r"-1\le x\le 1", ["[-1,1]"], ["(-1,1)", "[-1,2]"]),
    ],
    "equations": [
        ("y=3x-2", ["3x-2", "3x-y=2"], ["y=3x+2"]),
    ],
    "expressions": [
        ("(n+1)^2-n^2", ["2n+1"], ["2n-1"]),
        (r"\frac{n(n+1)}{2}", [r"\frac{n^2+n}{2}"], [r"\frac{n^2-n}{2}"]),
    ],
    "complex": [
        ("2-3i", ["-3i+2"], ["2+3i", "3-2i"]),
        ("i", [r"\sqrt{-1}"], ["-i", "1"]),
        ("-1", ["i^2", r"e^{i\pi}"], ["i", "1"]),
    ],
    "ratio": [
        ("3:4", ["3:4"], ["4:3", "3:5"]),
        ("1:2:3", ["1 : 2 : 3"], ["1:3:2", "1:2:4", "1:2"]),
    ],
    "times": [
        ("07:30", ["7:30"], ["7:31", "8:30"]),
    ],
    "bases": [
        ("1011_2", ["1011_{2}"], ["1010_2", "1011_3", "1011_{16}"]),
    ],
    "zero": [
        ("0", ["0.0", "-0"], ["1", "10^{-30}", "0.0000001"]),
    ],
    "logic": [
        (r"p\land q", [r"p \wedge q", "p\u2227q"], [r"p\lor q", "pq"]),
        (r"a\equiv 3\pmod 7", [r"a \equiv 3 \pmod{7}"], [r"a\equiv 3\pmod 5"]),
    ],
    "divided by zero": [
        ("5", ["5.0"], [r"\frac{1}{0}", r"\frac{5}{0}"]),
    ],
}


@pytest.mark.parametrize("kind", PAIRS)
def test_right_answers_are_right_and_wrong_ones_wrong(kind: str) -> None:
    for gold, right, wrong in PAIRS[kind]:
        for answer, reward in [(a, 1.0) for a in (gold, *right)] + [(a, 0.0) for a in wrong]:
            (verdict,) = judge(math_answer, [(rf"Thus \boxed{{{answer}}}.", gold, {})])
            assert (verdict.status, verdict.reward) == ("ok", reward), (gold, answer, verdict.message)


@pytest.mark.parametrize("gold", ["05:00", r"\frac{1}{0}", r"\ldots", "1 2 3", r"\forall", "}{", r"\frac", "?", "n=1"])
def test_no_ground_truth_that_passes_the_start_check_makes_wrong_answers_an_error(gold: str) -> None:
    for trial in trials("math", gold):
        (verdict,) = judge(math_answer, [(in_box(trial.answer), gold, {})])
        if trial.objection(verdict) is not None:
            return
    for answer in (
        "06:00",
        "7",
        r"\frac{2}{0}",
        "x",
        r"\text{none}",
        "(1,2)",
        r"\begin{pmatrix}1\end{pmatrix}",
        r"\frac{",
        "oo",
    ):
        (verdict,) = judge(math_answer, [(rf"\boxed{{{answer}}}", gold, {})])
        assert (verdict.status, verdict.reward) == ("ok", 0.0), (answer, verdict.message)


def test_the_rationale_of_gsm8k_is_its_answer() -> None:
    truth = "Each box holds 6 jars, so she packs 3*6 = <<3*6=18>>18 jars.\n#### 1,018"
    assert math_answer(r"Thus \boxed{1018}.", truth, {}) == 1.0
    assert math_answer(r"Thus \boxed{18}.", truth, {}) == 0.0


def test_dollar_signs_thousands_and_spaces_split_no_vote() -> None:
    read = build_reader("math")
    same = [r"\$1,500", r"$1,500$", r"1{,}500", r"1,500", r"\$ 1,500 ", r"\left(1,500\right)"]
    assert {read(rf"\boxed{{{answer}}}") for answer in same[:5]} == {"1,500"}
    assert read(r"\boxed{1 2}") != read(r"\boxed{12}")
    assert read(r"\boxed{\$}") is None
