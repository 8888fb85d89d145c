"""Normalises texts for comparison."""

import json
import re
from typing import Any

from tunery.rows.words import pattern

WORD = re.compile(pattern())
_ASCII_WORD = re.compile(r"\w+")
"""The same in texts without marks, and twice as fast."""
_NUMBER = re.compile(r"\d+")
NO_BLANKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
"""Letters of scripts without blanks between words, as a range of a pattern: Thai, Lao, Burmese, Khmer, Japanese and
Chinese."""
NO_BLANK = re.compile(f"[{NO_BLANKS}]")
"""One of them."""


def squash(text: str) -> str:
    """Returns the text in one case, with single blanks."""
    return " ".join(text.casefold().split())


def words(text: str) -> str:
    """Returns the text's words in one case, a blank between them; no punctuation."""
    return " ".join((_ASCII_WORD if text.isascii() else WORD).findall(text.casefold()))


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
