"""Instruction following: all verifiable instructions of a prompt are followed, or not (IFEval, prompt-level strict)."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from megatron_entropic.errors import UserError


def ifeval(response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """Return 1.0 if the response follows every instruction of the ground truth, else 0.0; an empty one follows none.

    Args:
        ground_truth: {"instruction_id_list": [...], "kwargs": [...]} as in the published data, or the same as JSON.
            Arguments that are None are as good as absent.

    Raises:
        UserError: a ground truth that is not of this form, an unknown instruction, or one that lacks an argument.
    """
    # All of them are looked at, so that a ground truth with a mistake in it is found whatever the response.
    followed = [_followed(response, name, given) for name, given in _instructions(ground_truth)]
    return float(all(followed))


def _instructions(ground_truth: Any) -> list[tuple[str, dict[str, Any]]]:
    truth = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    if not isinstance(truth, dict) or not truth.get("instruction_id_list"):
        raise UserError(f"expected a ground truth with instruction_id_list and kwargs, found {ground_truth!r:.200}")
    names = list(truth["instruction_id_list"])
    given = list(truth.get("kwargs") or [{}] * len(names))
    unknown = [name for name in names if name not in CHECKS]
    if unknown or len(given) != len(names):
        raise UserError(
            f"unknown instructions: {', '.join(map(str, unknown))}" if unknown else "kwargs is not as long as its ids"
        )
    return [
        (name, {key: value for key, value in (one or {}).items() if value is not None})
        for name, one in zip(names, given, strict=True)
    ]


def _followed(response: str, name: str, given: dict[str, Any]) -> bool:
    try:
        follows = CHECKS[name](response, given)
    except KeyError as error:
        raise UserError(f"the instruction {name} lacks the argument {error}") from error
    return bool(response.strip()) and follows


# The 25 kinds of verifiable instructions of IFEval (Zhou et al. 2023, arXiv 2311.07911), as checks of a response.
#
# Identifiers and arguments are those of the published data. Sentences, and words in capitals, are told apart by regular
# expressions where the published evaluation takes NLTK's models, and languages by `languages` where it takes
# langdetect.

Check = Callable[[str, Mapping[str, Any]], bool]
"""Function: (response, arguments) -> whether the response does what the instruction says."""

_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f\u0964]+[\"')\]\u201d]*(?=\s|$)|\n{2,}")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|vs|etc|e\.g|i\.e|[A-Z])\.(?=\s)")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _relation(count: int, bound: Any, relation: Any) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f"unknown relation {relation!r}")
    return count < int(bound) if relation == "less than" else count >= int(bound)


def _existence(text: str, given: Mapping[str, Any]) -> bool:
    return all(word.lower() in text.lower() for word in given["keywords"])


def _frequency(text: str, given: Mapping[str, Any]) -> bool:
    return _relation(text.lower().count(given["keyword"].lower()), given["frequency"], given["relation"])


def _forbidden_words(text: str, given: Mapping[str, Any]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in given["forbidden_words"])


def _letter_frequency(text: str, given: Mapping[str, Any]) -> bool:
    return _relation(text.lower().count(given["letter"].lower()), given["let_frequency"], given["let_relation"])


def _response_language(text: str, given: Mapping[str, Any]) -> bool:
    return guess_language(text) == given["language"]


def _number_sentences(text: str, given: Mapping[str, Any]) -> bool:
    return _relation(count_sentences(text), given["num_sentences"], given["relation"])


def count_sentences(text: str) -> int:
    """Number of stretches of text that end in a full stop, question or exclamation mark, a blank line, or the end."""
    plain = _ABBREVIATION.sub(lambda found: found.group()[:-1], text)
    return sum(any(letter.isalnum() for letter in part) for part in _SENTENCE_END.split(plain))


def _number_paragraphs(text: str, given: Mapping[str, Any]) -> bool:
    paragraphs = _without_empty_ends(re.split(r"\s?\*\*\*\s?", text))
    return all(part.strip() for part in paragraphs) and len(paragraphs) == int(given["num_paragraphs"])


def _number_words(text: str, given: Mapping[str, Any]) -> bool:
    return _relation(len(re.findall(r"\w+", text)), given["num_words"], given["relation"])


def _nth_paragraph_first_word(text: str, given: Mapping[str, Any]) -> bool:
    paragraphs = text.split("\n\n")
    nth = int(given["nth_paragraph"])
    if sum(bool(part.strip()) for part in paragraphs) != int(given["num_paragraphs"]) or nth > len(paragraphs):
        return False
    words = paragraphs[nth - 1].split()
    first = re.match(r"[^.,?!'\"]*", words[0].lstrip("'\"")) if words else None
    return first is not None and first.group().lower() == given["first_word"].lower()


def _number_placeholders(text: str, given: Mapping[str, Any]) -> bool:
    return len(re.findall(r"\[[^\]\n]*\]", text)) >= int(given["num_placeholders"])


def _postscript(text: str, given: Mapping[str, Any]) -> bool:
    marker = given["postscript_marker"]
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(marker, re.escape(marker)), text, re.IGNORECASE) is not None


def _number_bullet_lists(text: str, given: Mapping[str, Any]) -> bool:
    return len(re.findall(r"^[ \t]*(?:\*[^*\n]|-)", text, re.MULTILINE)) == int(given["num_bullets"])


def _constrained_response(text: str, given: Mapping[str, Any]) -> bool:
    return any(answer in text for answer in _ANSWERS)


def _number_highlighted_sections(text: str, given: Mapping[str, Any]) -> bool:
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    single = re.findall(r"\*([^\n*]*)\*", text)
    return sum(bool(part.strip()) for part in (*double, *single)) >= int(given["num_highlights"])


def _multiple_sections(text: str, given: Mapping[str, Any]) -> bool:
    found = re.findall(rf"\s?{re.escape(given['section_spliter'])}\s?\d+\s?", text)
    return len(found) >= int(given["num_sections"])


def _json_format(text: str, given: Mapping[str, Any]) -> bool:
    inner = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, given: Mapping[str, Any]) -> bool:
    return any(part.strip("<> ") for part in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str, given: Mapping[str, Any]) -> bool:
    parts = [part.strip() for part in _without_empty_ends(text.split("******"))]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _repeat_prompt(text: str, given: Mapping[str, Any]) -> bool:
    return text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


def _end_checker(text: str, given: Mapping[str, Any]) -> bool:
    return text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


def _quotation(text: str, given: Mapping[str, Any]) -> bool:
    plain = text.strip()
    return len(plain) > 1 and plain.startswith('"') and plain.endswith('"')


def _capital_word_frequency(text: str, given: Mapping[str, Any]) -> bool:
    capitals = sum(word.isupper() for word in re.findall(r"\w+(?:['-]\w+)*", text))
    return _relation(capitals, given["capital_frequency"], given["capital_relation"])


def _english_capital(text: str, given: Mapping[str, Any]) -> bool:
    return text.isupper() and guess_language(text) == "en"


def _english_lowercase(text: str, given: Mapping[str, Any]) -> bool:
    return text.islower() and guess_language(text) == "en"


def _no_comma(text: str, given: Mapping[str, Any]) -> bool:
    return "," not in text


def _without_empty_ends(parts: list[str]) -> list[str]:
    """The parts without blank ones at either end: a separator may also be at the beginning or the end of a text."""
    inner = parts[1:] if not parts[0].strip() else parts
    return inner[:-1] if inner and not inner[-1].strip() else inner


CHECKS: dict[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}


# A guess at the language of a text, for the thirty languages that IFEval names.
#
# By script first. Within a script that several languages share the most frequent small words decide, and letters that
# only one of them has count as such words (languages.json). Enough for an answer of a sentence or more.

_SCRIPTS = {
    "ARABIC": ("ar", "fa", "ur"),
    "BENGALI": ("bn",),
    "CYRILLIC": ("ru", "uk", "bg"),
    "DEVANAGARI": ("hi", "mr", "ne"),
    "GUJARATI": ("gu",),
    "GURMUKHI": ("pa",),
    "HANGUL": ("ko",),
    "HEBREW": ("he",),
    "HIRAGANA": ("ja",),
    "KATAKANA": ("ja",),
    "KANNADA": ("kn",),
    "LATIN": ("en", "es", "pt", "fr", "de", "it", "pl", "vi", "sw", "fi"),
    "MALAYALAM": ("ml",),
    "TAMIL": ("ta",),
    "TELUGU": ("te",),
    "THAI": ("th",),
}


@cache
def _signs() -> dict[str, tuple[list[str], str]]:
    """Signs of each language that shares its script: frequent words, and letters that no other language of it has."""
    content = json.loads(Path(__file__).with_name("languages.json").read_text(encoding="utf-8"))
    return {language: (signs["words"].split(), signs["letters"]) for language, signs in content.items()}


def guess_language(text: str) -> str | None:
    """Guess the ISO 639-1 code of a text's language, of thirty; None for a text without letters of theirs."""
    script = _script(text)
    if script is None:
        return None
    languages = _SCRIPTS[script]
    if len(languages) == 1:
        return languages[0]
    lower = unicodedata.normalize("NFC", text).lower()
    # Devanagari vowel signs are no word characters to `re`, so words are what white space and punctuation leave.
    words = Counter(re.split(r"[\s.,;:!?()\"\u0964\u060c\u06d4]+", lower))
    letters = Counter(lower)
    scores = {}
    for language in languages:
        frequent, own = _signs()[language]
        scores[language] = sum(words[word] for word in frequent) + sum(letters[letter] for letter in own)
    best = max(scores, key=lambda language: scores[language])
    return best if scores[best] else languages[0]


def _script(text: str) -> str | None:
    """The script with the most letters. Japanese has Chinese characters too, so those alone decide nothing."""
    names = Counter(unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha())
    known = Counter({name: count for name, count in names.items() if name in _SCRIPTS})
    return known.most_common(1)[0][0] if known else None
