"""Normalises texts for comparison."""

import json
import re
import unicodedata
from typing import Any

from tunery.rows.words import SIGNS, pattern

WORD = re.compile(pattern())
_ASCII_WORD = re.compile(r"\w+")
"""The same in texts without marks, and twice as fast."""
_ASCII_SIGN = r"[+=<>|~^$#&]|(?<!\w)-(?=\d)|(?<=\d)\*(?=\d)|(?<=\d )[-*/](?= \d)|(?<!\w)[:;]-?[()DPdp](?!\w)"
"""A sign with a meaning: of a sum, a currency or a name such as C++, or a face such as `:)`. Hyphens, list markers and
what stands for bold letters are none."""
_ASCII_TOKEN = re.compile(rf"\w+|{_ASCII_SIGN}")
_TOKEN = re.compile(rf"{pattern()}|[{SIGNS}]|{_ASCII_SIGN}")
_NUMBER = re.compile(r"\d+")
NO_BLANKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
"""Letters of scripts without blanks between words, as a range of a pattern: Thai, Lao, Burmese, Khmer, Japanese and
Chinese."""
NO_BLANK = re.compile(f"[{NO_BLANKS}]")
"""One of them."""


def squash(text: str) -> str:
    """Returns the text in one case, with single blanks and composed letters (NFC)."""
    return " ".join(_composed(text.casefold()).split())


def words(text: str) -> str:
    """Returns the text's words in one case, a blank between them; no punctuation."""
    return " ".join((_ASCII_WORD if text.isascii() else WORD).findall(_composed(text.casefold())))


def words_and_signs(text: str) -> str:
    """Returns the text's words in one case and its signs with a meaning, such as `+` and emoji: a question with others
    is another question."""
    return " ".join((_ASCII_TOKEN if text.isascii() else _TOKEN).findall(_composed(text.casefold())))


def asked(question: str) -> str:
    """Returns what equal questions have in common: their words and signs, or all of one that has neither."""
    return words_and_signs(question) or squash(question)


def is_sign(word: str) -> bool:
    """Whether one of `words_and_signs` is a sign."""
    return not (word[0].isalnum() or word[0] == "_")


def _composed(text: str) -> str:
    """Returns the text with one code point for a letter and its accent, as most programs write it, but not all."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def numbers(text: str) -> list[str]:
    """Returns the numbers that a text names, sorted: a question with others is another question."""
    return sorted(_NUMBER.findall(text))


def load_json(text: str) -> Any:
    """Returns the JSON object or list that a text is, or None."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
