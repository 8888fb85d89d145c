"""What a word is: letters and digits with the marks among them, such as the vowel signs of Hindi and Thai.

`\\w` has no marks, so it ends a word at each of them.
"""

import unicodedata
from collections.abc import Callable
from itertools import groupby

_JOINERS = "\u200c\u200d"
"""Invisible signs inside words, which say how letters are written together."""
_OF_SIGNS = ("VARIATION SELECTOR", "COMBINING ENCLOSING")
"""Beginnings of the names of marks that stand beside signs and emoji, not among letters."""


def _is_mark(character: str) -> bool:
    is_combining = unicodedata.category(character) in ("Mn", "Mc")
    return character in _JOINERS or (is_combining and not unicodedata.name(character, "").startswith(_OF_SIGNS))


def _is_sign(character: str) -> bool:
    return unicodedata.category(character) in ("Sm", "Sc", "So")


def _as_range(least: int, is_one: Callable[[str], bool]) -> str:
    """Returns the characters that are such as a range of a pattern."""
    points = (point for point in range(least, 0x20000) if is_one(chr(point)))
    runs = (list(run) for _, run in groupby(enumerate(points), lambda item: item[1] - item[0]))
    return "".join(f"{chr(run[0][1])}-{chr(run[-1][1])}" for run in runs)


MARKS = _as_range(0x300, _is_mark)
SIGNS = _as_range(0x80, _is_sign)
"""Signs of mathematics and currencies, and emoji, outside ASCII."""


def pattern(letters: str = r"\w") -> str:
    """Returns the pattern of a word of these letters, with marks after them."""
    return rf"{letters}+(?:[{MARKS}]+{letters}*)*"


def is_of_letters(text: str) -> bool:
    """Whether a text has letters alone, and marks on them."""
    return text.isalpha() or (text[:1].isalpha() and all(one.isalpha() or _is_mark(one) for one in text))


def ends_in_letter(text: str) -> bool:
    """Whether a text ends with a letter, or with marks on one."""
    return next((one.isalpha() for one in reversed(text) if not _is_mark(one)), False)
