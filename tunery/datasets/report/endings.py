"""Describes how an answer ends, as features for a classifier."""

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tunery.datasets.report.dictionary import Dictionary
from tunery.datasets.report.rows import Row

_COMMON = 100
_PROSE, _KNOWN = 0.15, 0.75
"""Minimum shares of common words, and of words in the dictionary, for an unknown last word to count as cut off."""
_LETTERS = "aiox"
"""Letters that are words by themselves."""
_PART = 3
_FINISHED = ".!?。！？"  # noqa: RUF001 (they are of other scripts)
_CLOSED = _FINISHED + "\"'”’)]}`»…）】」』*>|"  # noqa: RUF001 (likewise)
_GOES_ON = ",:;([{-—/=+*&、，："  # noqa: RUF001 (likewise)
_OPEN = {"(": ")", "[": "]", "{": "}"}
_NO_BLANKS = "\u3040-\u30ff\u3400-\u9fff"
"""Scripts without blanks between words: each character counts as a word."""
_WORD = re.compile(rf"[{_NO_BLANKS}]|[^\W_{_NO_BLANKS}]+(?:['’][^\W\d_]+)*")  # noqa: RUF001 (an apostrophe)
_ENDING = re.compile(rf"({_WORD.pattern})(?=[.!?]\s|[。！？]|[^\w\n]*\n)")  # noqa: RUF001 (likewise)
_SENTENCE = re.compile(r"[.!?]\s|[。！？]")  # noqa: RUF001 (likewise)
ITEM = re.compile(r"\s*(?:[-+*•]|\d+[.)-])")
_SUM = re.compile(r"(-?[\d,]*\.?\d+)\s*([-+*/x×÷])\s*[$€£]?\s*(-?[\d,]*\.?\d+)\s*=\s*[$€£]?\s*(-?[\d,]*\.?\d+)$")  # noqa: RUF001 (signs of sums)
_OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "/": operator.truediv,
    "÷": operator.truediv,
    **dict.fromkeys("*x×", operator.mul),  # noqa: RUF001 (likewise)
}
_CODE = re.compile(
    r"^\s*(?:def|class|import|from|for|while|if|return|print|var|let|const|function|public|#include|SELECT)\b"
    r"|[;{}]\s*$|^\s*\w+ ?= ?\S+\(",
    re.MULTILINE,
)
_CODE_LINES = 0.4
_LONGEST = 20_000
"""Characters of code that are parsed."""


def words(text: str) -> list[str]:
    """Returns the text's words in one case."""
    return _WORD.findall(text.casefold())


class Vocabulary:
    """The words of a file: in how many texts each occurs, how often it ends a line or sentence, and its beginnings."""

    def __init__(self, all_texts: Iterable[str], dictionary: Dictionary) -> None:
        self._dictionary = dictionary
        self._texts: Counter[str] = Counter()
        self._all: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        for text in all_texts:
            found = words(text)
            self._texts.update(set(found))
            self._all.update(found)
            # Not the end of the whole text, which may be truncated.
            self._ends.update(_ENDING.findall(text.casefold()))
        self._common = {word for word, _ in self._texts.most_common(_COMMON) if not word.isdigit()}
        often = (word for word, count in self._texts.items() if count > 1)
        self._beginnings = {word[:size] for word in often for size in range(1, len(word))}

    def prose(self, found: Sequence[str]) -> float:
        """Returns the share of the file's most common words: high in sentences, low in lists, code and arithmetic."""
        return sum(word in self._common for word in found) / len(found) if found else 0.0

    def is_part(self, row: Row) -> bool:
        """Whether an answer's last word begins another word of its row, or is unknown and begins a dictionary word."""
        answer = row.answer.rstrip()
        found = words(answer)
        if not found or not answer[-1].isalpha():
            return False
        if self._breaks_word(answer, found):
            return True
        there = {*found[:-1], *words(row.question)}
        rare = len(found[-1]) >= _PART and self._all[found[-1]] <= 1
        return rare and any(word.startswith(found[-1]) and word != found[-1] for word in there)

    def _breaks_word(self, answer: str, found: Sequence[str]) -> bool:
        """Whether a sentence ends with lower-case letters that are not a word of the language but begin one."""
        *before, last = found
        stands = answer[-len(last) :].islower() and answer[: -len(last)].endswith((" ", "\n", "-", "'", '"', "("))
        if not stands or self._dictionary.fraction(before) < _KNOWN:
            return False
        if len(last) == 1:
            return last not in _LETTERS and self.prose(found) >= _PROSE
        return self._all[last] <= 1 and not self._dictionary.frequency(last) and self._dictionary.longer(last) > 0

    def describe(self, word: str) -> list[float]:
        """Returns features of an answer's last word: whether it looks like part of a word or an unfinished sentence."""
        if not word or word.isdigit():
            return [0.0, 0.0, 6.0, 0.0, 0.0, -1.0]
        count, ends = self._all[word], self._ends[word]
        rare, begins = self._texts[word] <= 1, word in self._beginnings
        ending = float(np.log((ends + 0.5) / (count + 4)))
        return [rare, self._texts[word] <= 3, float(np.log1p(count)), rare and begins, rare and not begins, ending]

    def look_up(self, word: str, is_name: bool) -> list[float]:
        """Returns whether the dictionary has an answer's last word, and how often longer words begin with it."""
        if not word.isalpha():
            return [0.0] * 5
        count, longer = self._dictionary.frequency(word), self._dictionary.longer(word)
        unknown = not count and self._texts[word] <= 1
        goes_on = 0.0 if unknown else float(np.log((count + 1) / (longer + 1)))
        return [unknown, unknown and longer > 0, unknown and is_name, goes_on, float(np.log1p(count))]


def describe(answer: str, known: Vocabulary) -> list[float]:
    """Returns the features of an answer's end, besides its characters."""
    text = answer.rstrip()
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    found = words(text)
    last = found[-1] if found and text[-1].isalnum() else ""
    figures = [
        *_style(text, lines, known.prose(found)),
        *_marks(text, answer[len(text) :]),
        *_lines(text, lines),
        *(*known.describe(last), *known.look_up(last, text[-len(last) :][:1].isupper()), len(last)),
        *(text.count(",") / max(1, len(found)) * (text[-1] not in _CLOSED), len(found) <= 6, len(found) <= 2),
        *(*read_code(text, len(lines)), *read_sum(text)),
    ]
    return [float(figure) for figure in figures]


def _style(text: str, lines: Sequence[str], prose: float) -> list[float]:
    """Returns whether the answer is written in sentences, and if so how it ends."""
    open_end, sentences = text[-1] not in _CLOSED, len(_SENTENCE.findall(text[:-1]))
    return [
        *(prose, prose * open_end, (1 - prose) * open_end, prose * (len(lines) == 1) * open_end),
        *(sentences > 0, float(np.log1p(sentences)), sentences > 0 and open_end),
        bool(set(text) & set("=+*/\\<>|^")) * open_end,
    ]


def _marks(text: str, blanks: str) -> list[float]:
    """Returns features of the last character, the blanks after it, and open brackets and quotes."""
    last = text[-1]
    return [
        *(last in _FINISHED, last in _CLOSED, last.isalpha(), last.isdigit(), last in _GOES_ON),
        *(blanks != "", blanks == " ", blanks == "\n"),
        *(text.count(opened) > text.count(closed) for opened, closed in _OPEN.items()),
        text.count('"') % 2,
    ]


def _lines(text: str, lines: Sequence[str]) -> list[float]:
    """Returns how the last line compares with the lines before."""
    *before, last = lines
    finished = float(np.mean([line[-1] in _FINISHED for line in before])) if before else 0.5
    open_end, listed = text[-1] not in _FINISHED, bool(ITEM.match(last)) and len(lines) > 1
    sizes = [len(line) for line in before] if len(before) > 1 else [len(last)]
    worded = float(np.mean([line[-1].isalnum() for line in before])) if len(before) > 1 else float(last[-1].isalnum())
    return [
        *(finished, finished * open_end, listed, listed and finished < 0.5, listed and finished < 0.5 and open_end),
        *(float(np.log1p(len(text))), float(np.log1p(len(last))), float(np.log1p(len(lines)))),
        *(len(_WORD.findall(last)) <= 3, len(last) < 0.5 * min(sizes)),
        *(float(np.log((len(last) + 1) / (np.median(sizes) + 1))), worded, last[-1].isalnum() - worded),
    ]


def read_code(text: str, lines: int) -> list[float]:
    """Returns whether the answer looks like code, whether it parses as Python, and whether a bracket is open."""
    if len(_CODE.findall(text)) < _CODE_LINES * lines or len(text) > _LONGEST:
        return [0.0, 0.0, 0.0]
    try:
        ast.parse(text)
        whole = 1.0
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        whole = 0.0
    depth = sum(text.count(opened) - text.count(closed) for opened, closed in _OPEN.items())
    return [1.0, whole, float(depth > 0)]


def read_sum(text: str) -> list[float]:
    """Returns whether the answer ends with correct arithmetic, and with the beginning of a correct result."""
    match = _SUM.search(text[-80:])
    if not match:
        return [0.0, 0.0]
    first, sign, second, shown = match.groups()
    try:
        one, other, said = (float(number.replace(",", "")) for number in (first, second, shown))
        result = _OPERATORS[sign](one, other)
    except (ValueError, ZeroDivisionError, OverflowError):
        return [0.0, 0.0]
    correct = abs(said - result) <= 0.011 * max(1.0, abs(result))
    return [float(correct), float(not correct and f"{result:.6f}".startswith(shown.replace(",", "").rstrip(".")))]
