"""Normalises texts for comparison, and measures their similarity."""

import json
import re
from functools import lru_cache
from typing import Any

_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+")
SHINGLE = 3
"""Characters of a shingle: user texts are short, and one changed word must leave most of them alike."""


def squash(text: str) -> str:
    """Returns the text in one case, with single blanks."""
    return " ".join(text.casefold().split())


def words(text: str) -> str:
    """Returns the text's words in one case, a blank between them; no punctuation."""
    return " ".join(_WORD.findall(text.casefold()))


@lru_cache(maxsize=8192)
def shingles(text: str) -> frozenset[str]:
    """Returns the runs of SHINGLE characters of a text that `words` has made; the text itself where it is shorter."""
    return frozenset(text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)) or frozenset([text])


def similarity(first: str, second: str) -> float:
    """Returns the Jaccard similarity of two texts' shingles, 0 to 1."""
    one, other = shingles(first), shingles(second)
    common = len(one & other)
    return common / (len(one) + len(other) - common)


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
