"""The words of a file, and whether an answer's last word is a part of one or goes on to another."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from tunery.datasets.report.dictionary import Dictionary
from tunery.datasets.report.rows import Row

_COMMON = 100
_PROSE, _KNOWN = 0.15, 0.6
"""Minimum shares of common words, and of words in the dictionary, for an unknown last word to count as cut off."""
LETTERS = "aiox"
"""Letters that are words by themselves."""
_LEAST_WORDS = 4
"""Fewer words may be a label or an abbreviation."""
_OFTEN, _FINAL = 4, 0.05
"""Answers that may end with a cut word, and the share of its occurrences: one that ends more is a usual end."""
_RATHER = 50
"""How much more frequent longer words have to be than a known word that is taken for their part."""
_MOST_PAIRS = 2_000_000
"""Words of which the pairs are counted, which take more memory than the words."""
_NO_BLANKS = "\u3040-\u30ff\u3400-\u9fff"
"""Scripts without blanks between words: each character counts as a word."""
WORD = re.compile(rf"[{_NO_BLANKS}]|[^\W_{_NO_BLANKS}]+(?:['’][^\W\d_]+)*")  # noqa: RUF001 (an apostrophe)
_ENDING = re.compile(rf"({WORD.pattern})(?=[.!?]\s|[。！？]|[^\w\n]*\n)")  # noqa: RUF001 (likewise)
_APOSTROPHE = re.compile(r"\w['’]$")  # noqa: RUF001 (likewise)
_QUOTE = re.compile(r"(?:^|[\s(\[])['‘]")  # noqa: RUF001 (likewise)
_ENGLISH = """
the a an of and or but nor with from for to at by as that which who whose my your our their its is are was were be been
being has had have having will would can could should may might must shall if when while because than into onto between
during without within every each very such these those i he she we they in on about through
"""
FOLLOWED = frozenset(_ENGLISH.split())
"""English words that another one follows."""


def words(text: str) -> list[str]:
    """Returns the text's words in one case."""
    return WORD.findall(text.casefold())


class Vocabulary:
    """The words of a file: in how many texts each occurs, how often it ends a line, sentence or answer, and what
    follows it."""

    def __init__(self, all_texts: Iterable[str], answers: Iterable[str], dictionary: Dictionary) -> None:
        """`answers`: those that may be truncated, which are among `all_texts`."""
        self._dictionary = dictionary
        self._texts: Counter[str] = Counter()
        self._all: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        pairs: Counter[tuple[str, str]] = Counter()
        read = 0
        for text in all_texts:
            found = words(text)
            self._texts.update(set(found))
            self._all.update(found)
            # Not the end of the whole text, which may be truncated.
            self._ends.update(_ENDING.findall(text.casefold()))
            read += len(found)
            if read < _MOST_PAIRS:
                pairs.update(pairwise(found))
        self._common = {word for word, _ in self._texts.most_common(_COMMON) if not word.isdigit()}
        self._own = Dictionary(self._all)
        self._final = Counter(words(answer)[-1] for answer in answers if answer.rstrip()[-1:].isalpha())
        self._after: dict[str, Counter[str]] = {}
        self._longer_after: dict[str, Dictionary] = {}
        for (before, word), count in pairs.items():
            self._after.setdefault(before, Counter())[word] = count

    def prose(self, found: Sequence[str]) -> float:
        """Returns the share of the file's most common words: high in sentences, low in lists, code and arithmetic."""
        return sum(word in self._common for word in found) / len(found) if found else 0.0

    def breaks_off(self, row: Row) -> bool:
        """Whether an answer ends inside a word, or with a word that another one follows."""
        answer = row.answer.rstrip()
        found = words(answer)
        if len(found) < _LEAST_WORDS:
            return False
        if not answer[-1].isalpha():
            return _APOSTROPHE.search(answer) is not None and _QUOTE.search(answer) is None
        *before, last = found
        if self._final[last] > max(_OFTEN, _FINAL * self._all[last]):
            return False
        is_lower = answer[-len(last) :].islower()
        return self._goes_on(last, before, is_lower=is_lower) or (is_lower and self._is_part_in(row, last, before))

    def _goes_on(self, word: str, before: Sequence[str], *, is_lower: bool) -> bool:
        """Whether the language has the word only inside a sentence, or rather as the beginning of longer ones."""
        if word in FOLLOWED and self._dictionary.language == "en":
            return True
        longer, count = self._dictionary.longer(word), self._dictionary.frequency(word)
        if len(word) == 1:
            return word not in LETTERS or (is_lower and word not in before and longer > _RATHER * count)
        if not longer or self._dictionary.fraction(before) < _KNOWN:
            return False
        if not count:
            return self._all[word] <= 1 and (is_lower or self.prose(before) >= _PROSE)
        return is_lower and longer > _RATHER * count

    def _is_part_in(self, row: Row, word: str, before: Sequence[str]) -> bool:
        """Whether the word begins another one of its row, and occurs nowhere else in it."""
        there = {*before, *words(row.question)}
        is_rare = self._all[word] <= 1 or self.prose(before) >= _PROSE
        return word not in there and is_rare and _longer(there, word) > 0

    def describe(self, before: Sequence[str], word: str, own: Sequence[str], asked: Sequence[str]) -> list[float]:
        """Returns features of an answer's last word: whether it looks like part of a word or an unfinished sentence.

        `before`: the answer's other words; `own`: those of the answer before it was cut to learn from, which are not
        counted, as those of an answer that is truncated are not there either; `asked`: those of the question.
        """
        if not word:
            return [0.0] * 13
        rest, is_word = [*asked, *before], not word.isdigit()
        count, longer = self._all[word] - own.count(word), self._own.longer(word) - _longer(own, word)
        same, near = rest.count(word), _longer(rest, word)
        figures = [
            *(not is_word, count <= 0, count <= 2, float(np.log1p(max(0, count)))),
            *(count <= 0 < longer, count <= 0 and longer <= 0),
            is_word * float(np.log((self._ends[word] + 0.5) / (self._all[word] + 4))),
            *(is_word * _log_ratio(longer, count, 0.5), is_word * _log_ratio(near, same, 0.5)),
            not is_word and near > 0 and not same,
            *(self._describe_pair(before[-1], word, own, rest) if before and is_word else (0.0, 0.0, 0.0)),
        ]
        return [float(figure) for figure in figures]

    def _describe_pair(
        self, before: str, word: str, own: Sequence[str], rest: Sequence[str]
    ) -> tuple[float, float, float]:
        """Returns how often longer words that begin with the last one, and itself, follow the one before elsewhere."""
        after = self._after.get(before, Counter())
        mine, near = ([second for first, second in pairwise(some) if first == before] for some in (own, rest))
        same = max(0, after[word] - mine.count(word)) + near.count(word)
        if before not in self._longer_after:
            self._longer_after[before] = Dictionary(after)
        longer = max(0, self._longer_after[before].longer(word) - _longer(mine, word)) + _longer(near, word)
        return _log_ratio(longer, same, 0.3), longer > 0 and not same, same > 0

    def look_up(self, word: str, is_name: bool) -> list[float]:
        """Returns whether the dictionary has an answer's last word, and how often longer words begin with it."""
        if not word.isalpha():
            return [0.0] * 5
        count, longer = self._dictionary.frequency(word), self._dictionary.longer(word)
        unknown = not count and self._texts[word] <= 1
        goes_on = 0.0 if unknown else float(np.log((count + 1) / (longer + 1)))
        return [unknown, unknown and longer > 0, unknown and is_name, goes_on, float(np.log1p(count))]


def _longer(found: Iterable[str], word: str) -> int:
    """Returns how many longer words begin with this one."""
    return sum(other.startswith(word) and other != word for other in found)


def _log_ratio(longer: int, same: int, least: float) -> float:
    return float(np.log((max(0, longer) + least) / (max(0, same) + least)))
