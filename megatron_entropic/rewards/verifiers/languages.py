"""A guess at the language of a text, for the thirty languages that IFEval names.

By script first. Within a script that several languages share the most frequent small words decide, and letters that
only one of them has count as such words (languages.json). Enough for an answer of a sentence or more.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

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
    """Of each language that shares its script: frequent words, and letters that no other one of the script has."""
    content = json.loads(Path(__file__).with_name("languages.json").read_text(encoding="utf-8"))
    return {language: (signs["words"].split(), signs["letters"]) for language, signs in content.items()}


def guess_language(text: str) -> str | None:
    """ISO 639-1 code of the most probable of the thirty languages; None for a text without letters of theirs."""
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
