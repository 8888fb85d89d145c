"""The words and lines of a file, and whether an answer's last word is a part of one or goes on to another."""

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile
from typing import NamedTuple

from tunery.datasets.report import texts
from tunery.datasets.report.dictionary import Dictionary
from tunery.datasets.report.rows import Row
from tunery.rows.words import MARKS, ends_in_letter, is_of_letters, pattern

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
_MOST_WORDS = 500_000
"""Words after which no more rows are counted: it takes time and memory, and frequent words are known by then."""
_LINES, _START, _ASKED = 12, 60, 2000
"""Lines of an answer that are compared, characters of a line in which its first words are, and of a question that are
read."""
_WITH_BLANKS = pattern(rf"[^\W_{texts.NO_BLANKS}]")
WORD = re.compile(rf"[{texts.NO_BLANKS}][{MARKS}]*|{_WITH_BLANKS}(?:['’][^\W\d_]+)*")  # noqa: RUF001 (an apostrophe)
"""Where there are no blanks between words, each character counts as one, with its marks."""
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
_SEVERAL = frozenset({"two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "these", "those", "many"})
_THIRD = frozenset({"he", "she", "it", "who"})
_PHRASE = 5
"""Words before a plural among which "one of" is."""


def words(text: str) -> list[str]:
    """Returns the text's words in one case."""
    return WORD.findall(text.casefold())


def last_lines(text: str) -> list[str]:
    """Returns the text's last lines that are not blank, without the blanks at their ends."""
    return [line.rstrip() for line in text.rsplit("\n", _LINES)[-_LINES:] if line.strip()]


def start_of(line: str) -> str:
    """Returns a line's first two words, or its first signs."""
    return " ".join(words(line[:_START])[:2]) or line.strip()[:2]


class Own(NamedTuple):
    """What a vocabulary counted of one answer. It does not count in the answer's own features, nor in those of its
    parts, as the rest of an answer that is truncated is not there either."""

    words: str = ""
    line_starts: Sequence[str] = ()
    last_character: str = ""


class Vocabulary:
    """The words of a file's first rows: in how many texts each occurs, how often it ends a line, sentence or answer,
    and what follows it; and how the lines of answers begin."""

    def __init__(self, rows: Sequence[Row], dictionary: Dictionary, texts: Iterable[str] = ()) -> None:
        """`rows`: those whose answers may be truncated; `texts`: others of the file, of which the words count too."""
        self._dictionary = dictionary
        self._texts: Counter[str] = Counter()
        self._all: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        self._final: Counter[str] = Counter()
        self._last_lines: Counter[str] = Counter()
        self._inner_lines: Counter[str] = Counter()
        self._characters: Counter[str] = Counter()
        self._pairs: Counter[tuple[str, str]] = Counter()
        self.counted, self._read, lengths = 0, 0, []
        for row in takewhile(self._has_space, rows):
            self._count(row.question)
            self._count_end(row.answer.rstrip(), self._count(row.answer))
            lengths.append(len(row.answer))
            self.counted += 1
        for text in takewhile(self._has_space, texts):
            self._count(text)
        self._lengths = sorted(lengths)
        self._common = {word for word, _ in self._texts.most_common(_COMMON) if not word.isdigit()}
        self._own = Dictionary(self._all)
        self._after: dict[str, Counter[str]] = {}
        self._longer_after: dict[str, Dictionary] = {}
        for (before, word), count in self._pairs.items():
            self._after.setdefault(before, Counter())[word] = count

    def _has_space(self, _: object) -> bool:
        return self._read < _MOST_WORDS

    def _count(self, text: str) -> list[str]:
        """Counts the text's words, and returns them."""
        found = words(text)
        self._texts.update(set(found))
        self._all.update(found)
        # Not the end of the whole text, which may be truncated.
        self._ends.update(_ENDING.findall(text.casefold()))
        self._pairs.update(pairwise(found))
        self._read += len(found)
        return found

    def _count_end(self, answer: str, found: Sequence[str]) -> None:
        *before, last = map(start_of, last_lines(answer))
        self._last_lines[last] += 1
        self._inner_lines.update(before)
        self._characters[_kind(answer[-1])] += 1
        if ends_in_letter(answer):
            self._final[found[-1]] += 1

    def own(self, at: int, answer: str) -> Own:
        """Returns what was counted of the answer of row `at`."""
        if at >= self.counted:
            return Own()
        starts = [start_of(line) for line in last_lines(answer.rstrip())]
        return Own(_joined(words(answer)), starts, _kind(answer.rstrip()[-1]))

    def prose(self, found: Sequence[str]) -> float:
        """Returns the share of the file's most common words: high in sentences, low in lists, code and arithmetic."""
        return sum(word in self._common for word in found) / len(found) if found else 0.0

    def is_followed(self, word: str) -> bool:
        """Whether another word follows this one in the language, so that no sentence ends with it."""
        return word in FOLLOWED and self._dictionary.language == "en"

    def lacks_its_s(self, word: str, before: Sequence[str]) -> bool:
        """Whether an English word stands in its short form, as in "10 hour", "it cost" and "one of the best beach"."""
        inflected = before[-1] in _SEVERAL | _THIRD or (before[-1].isdigit() and before[-1] != "1")
        inflected = inflected or ("one", "of") in pairwise(before[-_PHRASE:])
        known = self._dictionary.frequency(word) and self._dictionary.frequency(word + "s")
        return self._dictionary.language == "en" and inflected and not word.endswith("s") and known > 0

    def line_starts(self, start: str, own: Own) -> tuple[int, int]:
        """Returns how many other answers' last lines, and lines before them, begin so."""
        *inner, last = own.line_starts or [""]
        return self._last_lines[start] - (start == last), self._inner_lines[start] - inner.count(start)

    def final_characters(self, text: str, own: Own) -> int:
        """Returns how many other answers end with the character, any letter or any digit, as the text does."""
        return self._characters[_kind(text[-1])] - (_kind(text[-1]) == own.last_character)

    def rank_of_length(self, length: int) -> float:
        """Returns the share of answers that are shorter."""
        return bisect_left(self._lengths, length) / max(1, self.counted)

    def breaks_off(self, text: str, question: str, found: Sequence[str]) -> bool:
        """Whether a text ends inside a word, or with a word that another one follows. `found`: its last words."""
        if len(found) < _LEAST_WORDS:
            return False
        if not ends_in_letter(text):
            return _APOSTROPHE.search(text) is not None and _QUOTE.search(text) is None
        *before, last = found
        if self._final[last] > max(_OFTEN, _FINAL * self._all[last]):
            return False
        is_lower = text[-len(last) :].islower()
        return self._goes_on(last, before, is_lower=is_lower) or (is_lower and self._is_part_in(question, last, before))

    def _goes_on(self, word: str, before: Sequence[str], *, is_lower: bool) -> bool:
        """Whether the language has the word only inside a sentence, or rather as the beginning of longer ones."""
        if self.is_followed(word):
            return True
        longer, count = self._dictionary.longer(word), self._dictionary.frequency(word)
        if len(word) == 1:
            return word not in LETTERS or (is_lower and word not in before and longer > _RATHER * count)
        if not longer or self._dictionary.fraction(before) < _KNOWN:
            return False
        if not count:
            return self._all[word] <= 1 and (is_lower or self.prose(before) >= _PROSE)
        return is_lower and longer > _RATHER * count

    def _is_part_in(self, question: str, word: str, before: Sequence[str]) -> bool:
        """Whether the word begins another one of its row, and occurs nowhere else in it."""
        is_rare = self._all[word] <= 1 or self.prose(before) >= _PROSE
        same, longer = _occurrences(_joined([*words(question[-_ASKED:]), *before]), word)
        return is_rare and longer > 0 and not same

    def describe(self, before: Sequence[str], word: str, own: Own, question: str) -> dict[str, float]:
        """Returns features of an answer's last word: whether it looks like part of a word or an unfinished sentence.
        `before`: the words before it."""
        is_word = bool(word) and not word.isdigit()
        rest = _joined([*words(question[-_ASKED:]), *before]) if is_word else ""
        own_same, own_longer = _occurrences(own.words, word) if word else (0, 0)
        same, near = _occurrences(rest, word) if is_word else (0, 0)
        count, longer = max(0, self._all[word] - own_same), max(0, self._own.longer(word) - own_longer) if word else 0
        return {
            "no word": not is_word,
            "new to the file": bool(word) and not count,
            "rare in the file": bool(word) and count <= 2,
            "count": math.log1p(count) if word else 0.0,
            "new, longer words are not": bool(word) and not count and longer > 0,
            "new, longer words too": bool(word) and not count and not longer,
            "ends sentences": is_word * math.log((self._ends[word] + 0.5) / (self._all[word] + 4)),
            "longer words in the file": is_word * _log_ratio(longer, count, 0.5),
            "longer words in the row": is_word * _log_ratio(near, same, 0.5),
            "only longer words in the row": is_word and near > 0 and not same,
            **self._describe_pair(before[-1] if before and is_word else "", word, own, rest),
        }

    def _describe_pair(self, before: str, word: str, own: Own, rest: str) -> dict[str, float]:
        """Returns how often longer words that begin with the last one, and itself, follow the one before elsewhere."""
        if not before:
            return {"longer words after the one before": 0.0, "only longer words there": 0.0, "the word there": 0.0}
        if before not in self._longer_after:
            self._longer_after[before] = Dictionary(self._after.get(before, Counter()))
        after, pair = self._longer_after[before], f"{before} {word}"
        own_same, own_longer = _occurrences(own.words, pair)
        row_same, row_longer = _occurrences(rest, pair)
        same = max(0, after.frequency(word) - own_same) + row_same
        longer = max(0, after.longer(word) - own_longer) + row_longer
        return {
            "longer words after the one before": _log_ratio(longer, same, 0.3),
            "only longer words there": longer > 0 and not same,
            "the word there": same > 0,
        }

    def look_up(self, word: str, *, is_name: bool) -> dict[str, float]:
        """Returns whether the dictionary has an answer's last word, and how often longer words begin with it."""
        known = is_of_letters(word)
        count, longer = (self._dictionary.frequency(word), self._dictionary.longer(word)) if known else (0, 0)
        unknown = known and not count and self._texts[word] <= 1
        return {
            "unknown": unknown,
            "unknown, longer words are not": unknown and longer > 0,
            "unknown name": unknown and is_name,
            "the word to longer ones": math.log((count + 1) / (longer + 1)) if known and not unknown else 0.0,
            "frequency": math.log1p(count),
        }


def _kind(character: str) -> str:
    """Returns the same for all letters, and for all digits."""
    return "a" if character.isalpha() else "0" if character.isdigit() else character


def _joined(found: Iterable[str]) -> str:
    return f" {' '.join(found)} "


def _occurrences(joined: str, start: str) -> tuple[int, int]:
    """Returns how often words occur in joined words, and how often with the last one longer."""
    same = joined.count(f" {start} ")
    return same, joined.count(f" {start}") - same


def _log_ratio(longer: int, same: int, least: float) -> float:
    return math.log((longer + least) / (same + least))
