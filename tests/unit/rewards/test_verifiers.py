"""What the built-in verifiers accept, and what they must not be fooled or broken by."""

from __future__ import annotations

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_entropic.rewards import build_verifier
from megatron_entropic.rewards.answers import last_boxed
from megatron_entropic.rewards.verifier import judge

countdown = build_verifier("countdown")
exact = build_verifier("exact")
math_answer = build_verifier("math")
PROBLEM = {"numbers": [3, 7, 5], "target": 26}


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("3*7+5", 1.0),
        (" 5 + 7 * 3\n", 1.0),
        ("7*3+5", 1.0),
        ("3+7*5", 0.0),  # 38: the product comes first
        ("3*7+5+0", 0.0),
        ("21+5", 0.0),
        ("3*7+5=26", 0.0),
        ("(3*7)+5", 0.0),
        ("3*7", 0.0),
        ("3*7+5-5+5", 0.0),
        ("3**7+5", 0.0),
        ("3*7+", 0.0),
        ("+3*7+5", 0.0),
        ("-3*7+5", 0.0),
        ("", 0.0),
        ("__import__('os').system('true')", 0.0),
        ("9**9**9**9**9", 0.0),
        ("3*7+5" * 100_000, 0.0),
        ("9" * 5000, 0.0),
        ("\u0663*\u0667+\u0665", 0.0),  # digits of another script
    ],
)
def test_countdown(response: str, reward: float) -> None:
    assert countdown(response, PROBLEM, {}) == reward


def test_countdown_takes_its_ground_truth_as_json_too() -> None:
    assert countdown("3*7+5", json.dumps(PROBLEM), {}) == 1.0


@pytest.mark.parametrize("ground_truth", ["26", "{}", 26, None, {"numbers": [1]}, "not json"])
def test_countdown_refuses_another_ground_truth(ground_truth: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        countdown("3*7+5", ground_truth, {})
    assert judge(countdown, [("3*7+5", ground_truth, {})])[0].status == "error"


@settings(deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_countdown_agrees_with_python(numbers: list[int], rng: random.Random) -> None:
    order = rng.sample(numbers, len(numbers))
    expression = str(order[0]) + "".join(rng.choice("+-*") + str(number) for number in order[1:])
    target = eval(expression)
    assert countdown(expression, {"numbers": numbers, "target": target}, {}) == 1.0
    assert countdown(expression, {"numbers": numbers, "target": target + 1}, {}) == 0.0
    assert countdown(expression, {"numbers": [*numbers, 1], "target": target}, {}) == 0.0


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-* ()/.eE_\n", max_size=60))
def test_countdown_never_raises_on_a_response(response: str) -> None:
    assert countdown(response, PROBLEM, {}) in (0.0, 1.0)


def test_exact() -> None:
    assert exact(" Paris\n", "Paris", {}) == 1.0
    assert exact("paris", "Paris", {}) == 0.0
    assert exact("12", 12, {}) == 1.0


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} then \boxed{2", None),
        (r"\fbox{7}", "7"),
        ("no box", None),
        (r"\boxed", None),
        (r"\boxed{}", ""),
    ],
)
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("gold", "response", "reward"),
    [
        ("34", r"thus \boxed{34}", 1.0),
        (r"\boxed{204}", r"\boxed{204}", 1.0),
        ("34", r"\boxed{33} or rather \boxed{34.0}", 1.0),
        ("34", r"\boxed{34} or rather \boxed{33}", 0.0),
        ("34", "34", 0.0),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        (r"\frac{1}{2}", r"\boxed{2}", 0.0),
        (7, r"\boxed{7}", 1.0),
        ({"target": "0", "solution": "..."}, r"\boxed{0}", 1.0),
        ({"answer": r"\sqrt{2}"}, r"\boxed{2^{1/2}}", 1.0),
        ("2", r"\boxed{" + "1+" * 10_000 + "1}", 0.0),
        ("2", r"\boxed{\frac{}{}}", 0.0),
        ("2", r"\boxed{}", 0.0),
        ("2", r"\boxed{}}}}{{{", 0.0),
    ],
)
def test_math(gold: object, response: str, reward: float) -> None:
    assert math_answer(response, gold, {}) == reward


def test_math_is_quick_on_a_huge_response() -> None:
    begin = time.monotonic()
    assert math_answer("{" * 1_000_000 + r"\boxed{34}", "34", {}) == 1.0
    assert math_answer(r"\boxed{" + "{" * 1_000_000, "34", {}) == 0.0
    assert time.monotonic() - begin < 10


def test_math_counts_an_empty_ground_truth_as_an_error() -> None:
    assert judge(math_answer, [(r"\boxed{1}", "  ", {})])[0].status == "error"
    assert judge(math_answer, [(r"\boxed{1}", {"solution": "1"}, {})])[0].status == "error"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("contdown", "did you mean countdown"),
        ("no_such_module_at_all:judge", "No module named 'no_such_module_at_all'"),
        ("json:no_such_function", "there is no function or class no_such_function in json"),
    ],
)
def test_verifiers_that_do_not_exist(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_verifier(name)


@pytest.mark.parametrize(("returned", "status"), [(1, "ok"), (True, "ok"), (float("nan"), "error"), ("no", "error")])
def test_what_a_verifier_returns_is_checked(returned: object, status: str) -> None:
    def verifier(response: str, truth: object, extra: object) -> object:
        return returned

    assert judge(verifier, [("", None, {})])[0].status == status  # type: ignore[arg-type]


def test_a_verifier_that_exits_does_not_end_the_run() -> None:
    def leaves(response: str, truth: object, extra: object) -> float:
        raise SystemExit(3)

    assert judge(leaves, [("", None, {})])[0].status == "error"
