"""Identifies the script of texts, and finds rows in another script than nearly all others."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from tunery.datasets.report.case import Case, Finding

_FRACTION = 0.9
_LEAST = 20
"""Rows below which shares say nothing."""
_LETTERS = 400
"""Letters of a text that are examined."""
_EAST = frozenset({"CJK", "HIRAGANA", "KATAKANA"})
"""Scripts that occur together in a text."""
_LATIN = re.compile("[A-Za-z]")
_ACTION = "Correct the language, or give rows of another language a file of their own."


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    first = unicodedata.name(letter, "").partition(" ")[0]
    return "East Asian" if first in _EAST else first.capitalize()


def script_of(text: str) -> str | None:
    """Returns the script of most letters, such as Latin, Cyrillic or Arabic; None for a text without letters."""
    if text.isascii():
        return "Latin" if _LATIN.search(text) else None
    letters = [letter for letter in text[: 4 * _LETTERS] if letter.isalpha()][:_LETTERS]
    counts = Counter(map(_script, letters))
    return counts.most_common(1)[0][0] if counts else None


def find(case: Case) -> Iterator[Finding]:
    """Finds rows whose question or answer is in another script than at least nine in ten."""
    for part in ("question", "answer"):
        scripts = {row.line: script_of(getattr(row, part)) for row in case.answered}
        counts = Counter(script for script in scripts.values() if script is not None)
        if counts.total() < _LEAST:
            continue
        usual, count = counts.most_common(1)[0]
        fraction = count / counts.total()
        for line, script in scripts.items():
            if fraction >= _FRACTION and script not in (usual, None):
                why = f"The {part} is written in {script} letters, but {fraction:.1%} of the others in {usual} ones."
                yield Finding("other_script", [line], fraction, why, _ACTION)
