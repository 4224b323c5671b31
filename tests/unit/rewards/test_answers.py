"""`reward.answer`: how the answer is found in a response, for the verifiers that read one."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_entropic.config.base import Violation
from megatron_entropic.config.data import RewardConfig
from megatron_entropic.config.names import ANSWERS, VERIFIERS
from megatron_entropic.config.reward_checks import reward_violations
from megatron_entropic.config.run import Config
from megatron_entropic.errors import UserError
from megatron_entropic.rewards import RewardScorer, build_reader, build_verifier
from megatron_entropic.rewards.answers import by_pattern, first_line, last_boxed, last_number
from megatron_entropic.rewards.judge import Judge
from megatron_entropic.rewards.verifier import lone_answer
from megatron_entropic.rewards.verifiers.math import math_answer

NUMBERS = [
    ("85", "85"),
    (" 85\n12 + 3 = 15", "15"),
    ("5 + 7 = 12, so she has 12 apples.", "12"),
    ("The answer is -3.", "-3"),
    ("x=-3", "-3"),
    ("= \N{MINUS SIGN}3", "-3"),
    ("+3", "3"),
    ("5-3", "3"),
    ("5 - 3", "3"),
    ("f(x)-3", "3"),
    ("It costs $1,234.50.", "1,234.50"),
    ("It costs -$5", "-5"),
    (r"\$18", "18"),
    ("1,2,3", "3"),
    ("1,234,567", "1,234,567"),
    ("1234,567", "567"),
    ("0.5", "0.5"),
    ("is .5", ".5"),
    ("5.", "5"),
    ("3/4", "3/4"),
    ("-3/4 of it", "-3/4"),
    (r"\frac{3}{4}", r"\frac{3}{4}"),
    (r"-\dfrac{3}{4}", r"-\dfrac{3}{4}"),
    ("25%", "25%"),
    (r"25\% of them", r"25\%"),
    ("25 % of them", "25 %"),
    ("6.02e23", "6.02e23"),
    ("2e", "2"),
    ("12pm", "12"),
    ("5km", "5"),
    ("H2O", None),
    ("7 x2", "7"),
    ("no number", None),
    ("", None),
    ("12 and \N{SUPERSCRIPT TWO}", "12"),
    ("\N{ARABIC-INDIC DIGIT THREE}", None),
    ("2026-11-28", "28"),
    (r"so \boxed{12} it is", "12"),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == number
    if number is not None:
        assert last_number(number) == number, "the answer alone is read as it was in its response"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (" 85\n12 + 3 = 15", "85"),
        ("\n \n\t85 \r\nmore", "85"),
        ("85", "85"),
        (" yes, it is ", "yes, it is"),
        ("a\u2028b\nc", "a\u2028b"),
        ("", None),
        (" \n\t", None),
    ],
)
def test_the_first_line_of_a_text(text: str, line: str | None) -> None:
    assert first_line(text) == line


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"Answer: (\S+)", "Answer: 3\nQuestion\nAnswer: 12\n", "12"),
        (r"[0-9]+", "3 then 4", "4"),
        (r"^= (.*)$", "5 + 7\n=  12 \n", "12"),
        (r"(?:yes: (\w+)|no: (\w+))", "no: b", "b"),
        (r"Answer:( *)", "Answer:  ", None),
        (r"Answer", "nothing", None),
        (r"\A.*?(-?[0-9]+)[^0-9\n]*$", "5 + 7 = 12 apples\n13", "12"),
        (r"(a)|b", "b", None),
    ],
)
def test_an_answer_by_pattern(pattern: str, text: str, answer: str | None) -> None:
    assert by_pattern(re.compile(pattern, re.MULTILINE), text) == answer


@pytest.mark.parametrize(
    ("answer", "truth", "response", "reward"),
    [
        ("last_number", "12", "5 + 7 = 12, so 12.", 1.0),
        ("last_number", "12", "12 of 13", 0.0),
        ("last_number", "12", r"\boxed{12} and 1", 0.0),
        ("last_number", "1234.5", "$1,234.50", 1.0),
        ("last_number", "0.75", "It is 3/4.", 1.0),
        ("last_number", r"\frac{3}{4}", "0.75", 1.0),
        ("last_number", "-3", "it is \N{MINUS SIGN}3", 1.0),
        ("last_number", "0.25", "25%", 1.0),
        ("last_number", "12", "none", 0.0),
        ("first_line", "12", " 12\n3 + 4 = 7", 1.0),
        ("first_line", "12", " 12 13\n", 0.0),
        ("first_line", "12", r" $12$." + "\n", 1.0),
        ("first_line", "x=2", "x = 2\nbecause", 1.0),
        ("first_line", "12", "} 12", 0.0),
        ("whole_response", "12", " 12 ", 1.0),
        ("whole_response", "12", "12\n13", 0.0),
        ("regex", "12", "Answer: 12.0 apples", 1.0),
        ("regex", "12", "12", 0.0),
        ("boxed", "12", r"\boxed{12}", 1.0),
        (None, "12", r"\boxed{12}", 1.0),
        (None, "12", "12", 0.0),
    ],
)
def test_math_judges_the_answer_that_was_found(answer: str | None, truth: str, response: str, reward: float) -> None:
    settings = RewardConfig(answer=answer, answer_pattern=r"Answer: (\S+)" if answer == "regex" else "")
    assert build_verifier("math", settings)(response, truth, {}) == reward


@pytest.mark.parametrize(
    ("verifier", "answer", "truth", "response", "reward"),
    [
        ("exact", "first_line", "Paris", "Paris\nQuestion: and Rome?", 1.0),
        ("exact", None, "Paris", "Paris\nQuestion: and Rome?", 0.0),
        ("exact", "boxed", "Paris", r"\boxed{Paris}", 1.0),
        ("exact", "boxed", "", "no box", 0.0),
        ("countdown", "first_line", {"numbers": [3, 7, 5], "target": 26}, "3*7+5\n1,2>3:", 1.0),
        ("countdown", "boxed", {"numbers": [3, 7, 5], "target": 26}, "3*7+5", 0.0),
    ],
)
def test_verifiers_of_whole_responses_take_answers_too(
    verifier: str, answer: str | None, truth: Any, response: str, reward: float
) -> None:
    assert build_verifier(verifier, RewardConfig(answer=answer))(response, truth, {}) == reward


def test_votes_and_pages_read_what_is_judged() -> None:
    read = build_reader("math", RewardConfig(answer="last_number"))
    assert read("It costs $1,234.") == read("1,234") == "1,234"
    assert read("nothing") is None
    assert build_reader("exact", RewardConfig(answer="first_line"))("a \nb") == "a"
    assert build_reader("exact")(" a\nb ") == "a\nb"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-.,/%$eE{}\\boxed frac\n", max_size=60))
def test_an_answer_alone_is_read_as_in_its_response(response: str) -> None:
    """Equal answers to one prompt are judged once, by the answer and without the rest of the response."""
    for name in ("boxed", "last_number", "first_line"):
        with_rest = RewardConfig(answer=name, workers=0)
        judge = Judge(with_rest, "math")
        assert judge.decisive is not None
        alone = judge.decisive(response)
        read = build_reader("math", with_rest)
        assert read(alone) == read(response), name


def test_what_a_pattern_of_somebody_finds_is_not_looked_for_in_the_driver() -> None:
    """Such a pattern can take any time; only a verifier process has limits."""
    settings = RewardConfig(answer="regex", answer_pattern="(a+)+b", workers=0)
    assert Judge(settings, "math").decisive is None
    assert all(ANSWERS[name].alone is not None for name in ANSWERS if not ANSWERS[name].takes_pattern)


def test_reading_is_quick_on_a_huge_response() -> None:
    begin = time.monotonic()
    for unit in ("1", "1,", "1,111", "1e1", "-", "\n", "1/", "."):
        for reading in (last_number, first_line, last_boxed):
            reading(unit * 300_000)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("answer", "truth", "reason"),
    [
        ("boxed", "x+1", None),
        ("last_number", "12", None),
        ("last_number", "18 jars.\n#### 1,018", None),
        ("last_number", "x+y", "as an answer it is judged wrong"),
        ("first_line", "x+y", None),
        ("regex", "x+y", None),
        ("regex", " ", "the ground truth is empty"),
    ],
)
def test_ground_truths_that_no_response_can_give_are_found_before_training(
    answer: str, truth: str, reason: str | None
) -> None:
    config = RewardConfig(answer=answer, answer_pattern="Answer: (.*)" if answer == "regex" else "", workers=0)
    with RewardScorer(config) as scorer:
        assert scorer.truth_problems([truth]) == [reason]


def test_a_reading_that_does_not_exist_is_the_persons_mistake() -> None:
    with pytest.raises(UserError, match="did you mean last_number"):
        build_reader("math", RewardConfig(answer="last_numbr"))
    with pytest.raises(UserError, match=r"reward\.answer_pattern: not a regular expression"):
        build_reader("math", RewardConfig(answer="regex", answer_pattern="("))


@pytest.mark.parametrize("name", [name for name, entry in VERIFIERS.items() if entry.answer is not None])
def test_every_verifier_that_reads_an_answer_has_a_way_of_its_own_and_a_vote(name: str) -> None:
    entry = VERIFIERS[name]
    assert entry.answer in ANSWERS
    assert entry.vote is not None
    assert lone_answer(entry.answer)("12")


def test_boxed_is_what_math_always_did() -> None:
    for response in (r"so \boxed{1} and \boxed{\frac{1}{2}}.", r"\boxed{}", "1/2", r"\boxed{2", r"\fbox{0.5}"):
        assert build_verifier("math")(response, "1/2", {}) == math_answer(response, "1/2", {})


def violations(reward: dict[str, Any]) -> list[Violation]:
    """What the start of a run says against a section `reward`."""
    sections = {"model": {"hf_dir": "model"}, "data": {"train_files": "train.parquet"}, "reward": reward}
    return list(reward_violations(Config.model_validate(sections)))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"answer": "last_numbr"}, "reward.answer='last_numbr': expected one of boxed, last_number, first_line,"),
        ({"answer": "regex"}, "reward.answer_pattern: reward.answer=regex needs one"),
        ({"answer": "regex", "answer_pattern": "("}, "reward.answer_pattern: not a regular expression: "),
        ({"answer_pattern": "x"}, "reward.answer_pattern has no use without reward.answer=regex"),
        ({"answer": "boxed", "verifier": "ifeval"}, "reward.answer=boxed has no use: ifeval looks at the response as"),
        (
            {"answer": "boxed", "verifier": "os:system"},
            "reward.answer=boxed has no use: os:system looks at the response",
        ),
    ],
)
def test_an_answer_that_nobody_reads_or_that_cannot_be_found(reward: dict[str, Any], message: str) -> None:
    (violation,) = violations(reward)
    assert violation.message.startswith(message)


def test_an_answer_that_an_added_reward_reads_has_a_use() -> None:
    assert not violations({"answer": "first_line", "verifier": "ifeval", "added": {"exact": 0.5}})
