"""Describes how an answer ends, as features for a classifier."""

import ast
import operator
import re
from collections.abc import Callable, Sequence

import numpy as np

from tunery.datasets.report.vocabulary import FOLLOWED, LETTERS, WORD, Vocabulary, words

_SHORT_NAME = 3
_FINISHED = ".!?。！？"  # noqa: RUF001 (they are of other scripts)
_CLOSED = _FINISHED + "\"'”’)]}`»…）】」』*>|"  # noqa: RUF001 (likewise)
_GOES_ON = ",:;([{-—/=+*&、，："  # noqa: RUF001 (likewise)
_OPEN = {"(": ")", "[": "]", "{": "}"}
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


def describe(answer: str, own: Sequence[str], asked: Sequence[str], known: Vocabulary) -> list[float]:
    """Returns the features of an answer's end, besides its characters. `own`, `asked`: as for the vocabulary."""
    text = answer.rstrip()
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    found = words(text)
    last = found[-1] if found and text[-1].isalnum() else ""
    figures = [
        *_style(text, lines, known.prose(found)),
        *_marks(text, answer[len(text) :]),
        *_lines(text, lines),
        *(*known.describe(found[:-1], last, own, asked), *known.look_up(last, _is_name(text, last)), len(last)),
        *(text.count(",") / max(1, len(found)) * (text[-1] not in _CLOSED), len(found) <= 6, len(found) <= 2),
        *(*read_code(text, len(lines)), *read_sum(text)),
        *(last in FOLLOWED, last in FOLLOWED and len(found) > 6, *_open(text, lines)),
        *(len(last) == 1 and last.isalpha() and last not in LETTERS, _is_name(text, last)),
        *(_is_name(text, last) and len(last) <= _SHORT_NAME, len(lines) > 1 and len(words(lines[-1])) == 1),
    ]
    return [float(figure) for figure in figures]


def _is_name(text: str, last: str) -> bool:
    return text[-len(last) :][:1].isupper() if last else False


def _open(text: str, lines: Sequence[str]) -> list[float]:
    """Returns what is open at the end: a possessive, quotes, marks of code and emphasis, a tag, a table's row."""
    cells = [max(line.count(mark) for mark in "|\t") for line in lines]
    return [
        text[-1] in "'’" and text[-2:-1].isalnum() and text.count("'") % 2 == 1,  # noqa: RUF001 (an apostrophe)
        text.count("“") > text.count("”"),
        *(text.count("`") % 2, text.count("**") % 2, text.count("<") > text.count(">")),
        len(cells) > 2 and cells[-1] < cells[-2] == cells[-3],
    ]


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
        *(len(WORD.findall(last)) <= 3, len(last) < 0.5 * min(sizes)),
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
