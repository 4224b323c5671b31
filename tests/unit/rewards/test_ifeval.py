"""Each kind of instruction with responses that follow it and responses that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_entropic.config.run import RewardConfig
from megatron_entropic.rewards import RewardScorer, build_verifier
from megatron_entropic.rewards.verifiers.ifeval import CHECKS, count_sentences, guess_language

ifeval = build_verifier("ifeval")

TABLE: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["Cat", "dog"]}, ["a dog, a CAT"], ["a dog"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, ["Cat cat"], ["cat"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, ["cat", "x"], ["cat cat"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["concatenate"], ["a Cat."]),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "at least"}, ["zZ"], ["z"]),
    ("language:response_language", {"language": "de"}, ["Das ist nicht ein Haus."], ["This is the house."]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        ["A b. C?"],
        ["One. Two! Three."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na***b\n***"],
        ["a", "a***\n***b"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["one, two three"], ["one two"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        ['First.\n\n"then, it went'],
        ["First.\n\nIt", "then", "a\n\nb\n\nthen"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] at [place]"], ["[name]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["x\np. s. more"], ["ps more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["x\nP.P.S. more"], ["P.S. more"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n  - b", "- a\n- b\nc"], ["* a", "**a**\n- b"]),
    ("detectable_format:constrained_response", {}, ["Well. My answer is maybe."], ["maybe"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and **b**"], ["*a*", "** ** *a*"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "PART", "num_sections": 2},
        ["PART 1 a\nPART 2"],
        ["PART 1"],
    ),
    ("detectable_format:json_format", {}, ['{"a": [1]}', '```json\n{"a": 1}\n```'], ["{a: 1}", "[" * 100000]),
    ("detectable_format:title", {}, ["<<A day>>\ntext"], ["<< >>", "<A day>"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a******a", "a******b******c", "a******"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, ["say it. It."], ["It."]),
    ("startend:end_checker", {"end_phrase": "The end."}, ['So "the end."'], ["The end. Or not"]),
    ("startend:quotation", {}, [' "all of it" '], ['"', 'said "it"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["This is ONE"],
        ["I SAY"],
    ),
    ("change_case:english_capital", {}, ["THIS IS THE HOUSE."], ["This is the house.", "DAS IST NICHT EIN HAUS."]),
    ("change_case:english_lowercase", {}, ["this is the house."], ["This is the house."]),
    ("punctuation:no_comma", {}, ["no; none"], ["one, two"]),
]


def truth(name: str, given: dict[str, Any]) -> dict[str, Any]:
    return {"instruction_id_list": [name], "kwargs": [{"language": None, "num_words": None} | given]}


@pytest.mark.parametrize(("name", "given", "right", "wrong"), TABLE)
def test_each_instruction(name: str, given: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    assert [ifeval(text, truth(name, given), {}) for text in (*right, *wrong)] == [1.0] * len(right) + [0.0] * len(
        wrong
    )


def test_the_table_has_all_25_kinds() -> None:
    assert len(CHECKS) == 25
    assert {name for name, *_ in TABLE} == set(CHECKS)


def test_all_instructions_have_to_be_followed_and_an_empty_response_follows_none() -> None:
    both = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    assert [ifeval(text, both, {}) for text in ('"a"', '"a,"', "a", " ")] == [1.0, 0.0, 0.0, 0.0]
    assert ifeval('"a"', json.dumps(both), {}) == 1.0


def test_mistakes_in_ground_truths_are_found() -> None:
    mistakes = [
        truth("keywords:unheard", {}),
        truth("keywords:existence", {}),
        {"instruction_id_list": ["punctuation:no_comma", "startend:end_checker"], "kwargs": [{}, {}]},
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": []} | {"kwargs": [{}, {}]},
        truth("keywords:frequency", {"keyword": "a", "frequency": 1, "relation": "about"}),
        "no",
        {},
    ]
    with RewardScorer(RewardConfig(verifier="ifeval", workers=0)) as scorer:
        reasons = scorer.truth_problems([*mistakes, truth("punctuation:no_comma", {})])
    assert [reason is None for reason in reasons] == [False] * 7 + [True]
    assert "unknown instructions: keywords:unheard" in str(reasons[0])
    assert "lacks the argument 'keywords'" in str(reasons[1])


def test_sentences() -> None:
    counts = {
        "One. Two! Three?": 3,
        "Dr. No is here.": 1,
        "a\n\nb": 2,
        'He said "no." Then.': 2,
        "3.5 is more.": 1,
        "": 0,
    }
    assert {text: count_sentences(text) for text in counts} == counts


def test_languages() -> None:
    sentences = json.loads(Path(__file__).with_name("sentences.json").read_text(encoding="utf-8"))
    assert {language: guess_language(text) for language, text in sentences.items()} == {k: k for k in sentences}
    assert guess_language("123 + 4") is None
