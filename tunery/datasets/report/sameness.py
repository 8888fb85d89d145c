"""Tells questions that ask the same apart from others that only share a template, an instruction or a context.

Both are similar by their shingles. A question that was typed again has a greeting, a typo or some small words more or
less; another question has other words of content in their place.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from tunery.datasets.report import shingles, texts

_END = re.compile(r"(?<=[.!?:;])\s+|\n+|(?<=[\u3002\uff01\uff1f])")
_LEAST_QUESTIONS, _SHARE, _LEAST_WORDS = 20, 0.2, 3
"""Different questions from which on, the share of them that must have a sentence, and words that it must have, to be an
instruction to all of them. A greeting has fewer words."""
_CONTENT = 4
"""Least letters of a word of content; in English, stop words are none either."""
_FUNCTION = ENGLISH_STOP_WORDS - {
    "bill", "computer", "cry", "describe", "detail", "empty", "fill", "find", "fire", "full", "interest", "keep",
    "made", "make", "mill", "mine", "move", "name", "part", "serious", "side", "sincere", "system", "take", "thick",
    "thin", "three", "four", "five", "eight", "nine", "eleven", "twelve", "fifteen", "twenty", "forty", "fifty",
    "sixty", "hundred", "first", "last", "next", "back", "front", "bottom",
}  # fmt: skip
"""scikit-learn's stop words, without those that say what is asked."""
_FEW = 0.1
"""The share of the words of content that a long question may have in place of others, and ask the same."""
_ALIKE = 0.75
"""Least share of the longer one of two spellings of a word that they begin and end with."""
_STEM, _STEM_SHARE = 4, 0.55
"""Least letters that two forms of a word begin with, and their least share of the longer one."""
_REST = 0.5
"""Least Jaccard similarity of the shingles of what questions with a common sentence have besides."""
_MOST = 30
"""Maximum words of each question that are compared as spellings."""


def sentences(text: str) -> list[str]:
    """Returns the words of each sentence and line of a text."""
    return [words for part in _END.split(text) if (words := texts.words(part))]


def instructions(questions: Iterable[Sequence[str]]) -> frozenset[str]:
    """Returns the sentences that many of these different questions have, each given by its sentences."""
    counts: Counter[str] = Counter()
    total = 0
    for question in questions:
        total += 1
        counts.update(set(question))
    if total < _LEAST_QUESTIONS:
        return frozenset()
    often = (sentence for sentence, count in counts.items() if count >= _SHARE * total)
    return frozenset(sentence for sentence in often if len(sentence.split()) >= _LEAST_WORDS)


def ask_the_same(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether similar questions, given by their sentences, have no words of content in place of others."""
    common = set(one) & set(other)
    rests = [" ".join(part for part in question if part not in common) for question in (one, other)]
    here, there = (rest.split() for rest in rests)
    if {*here} <= {*there} or {*there} <= {*here}:
        return True
    if any(len(part.split()) >= _LEAST_WORDS for part in common) and _overlap(*rests) < _REST:
        return False
    only_here, only_there = _content(here, set(there)), _content(there, set(here))
    if not only_here or not only_there:
        return True
    replaced = min(_unlike(only_here, only_there), _unlike(only_there, only_here))
    return replaced <= _FEW * max(len(_content(here)), len(_content(there)))


def _overlap(one: str, other: str) -> float:
    here, there = ({text[at : at + shingles.SHINGLE] for at in range(len(text))} for text in (one, other))
    return len(here & there) / len(here | there)


def _content(words: Iterable[str], known: Collection[str] = ()) -> list[str]:
    """Returns the different words of content that are not known."""
    found = {word for word in words if len(word) >= _CONTENT and word not in known}
    return sorted(found - _FUNCTION)


def _unlike(words: Sequence[str], others: Sequence[str]) -> int:
    """Returns how many words are no other spelling of one of the others."""
    return sum(not any(_is_spelling(word, other) for other in others[:_MOST]) for word in words[:_MOST])


def _is_spelling(word: str, other: str) -> bool:
    """Whether words differ in one letter, in the order of two, or in little of their length, or have one stem."""
    shorter, longest = min(len(word), len(other)), max(len(word), len(other))
    if word[0] != other[0] and word[-1] != other[-1]:
        return False
    start = next((at for at in range(shorter) if word[at] != other[at]), shorter)
    rest = shorter - start
    end = next((at for at in range(rest) if word[-1 - at] != other[-1 - at]), rest)
    one, two = word[start : len(word) - end], other[start : len(other) - end]
    is_swapped = len(one) == 2 and one == two[::-1]
    has_one_stem = start >= max(_STEM, _STEM_SHARE * longest)
    return max(len(one), len(two)) <= 1 or is_swapped or has_one_stem or start + end >= _ALIKE * longest
