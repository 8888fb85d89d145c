"""The words of a language, and which of them begin with a given word."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate, islice

from spellchecker import SpellChecker

from tunery.datasets.report import languages

_READ = 200
"""Number of texts whose language is identified."""
_LAST = chr(0x10FFFF)


class Dictionary:
    """Frequencies of a language's words."""

    def __init__(self, frequencies: Mapping[str, int], language: str = "") -> None:
        self.language = language
        self._frequencies = frequencies
        self._words = sorted(frequencies)
        self._sums = [0, *accumulate(frequencies[word] for word in self._words)]

    def frequency(self, word: str) -> int:
        """Returns the word's frequency, as it is or without the part after an apostrophe; 0 if unknown."""
        return self._frequencies.get(word, 0) or self._frequencies.get(word.replace("\u2019", "'").partition("'")[0], 0)

    def longer(self, word: str) -> int:
        """Returns the frequency of longer words that begin with this one."""
        first, last = bisect_left(self._words, word), bisect_left(self._words, word + _LAST)
        return self._sums[last] - self._sums[first] - self._frequencies.get(word, 0)

    def fraction(self, words: Sequence[str]) -> float:
        """Returns the share of the words that are in the language."""
        return sum(word in self._frequencies for word in words) / len(words) if words else 0.0


def of(texts: Iterable[str]) -> Dictionary:
    """Returns the dictionary of the first texts' most frequent language; an empty one for unsupported languages."""
    found = Counter(filter(None, (languages.language_of(text) for text in islice(texts, _READ))))
    return _load(found.most_common(1)[0][0] if found else "")


@cache
def _load(language: str) -> Dictionary:
    known = language in SpellChecker.languages()
    return Dictionary(dict(SpellChecker(language=language).word_frequency.dictionary) if known else {}, language)
