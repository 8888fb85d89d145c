"""Describes how an answer ends, as features for a classifier."""

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence

from tunery.datasets.report.vocabulary import LETTERS, Own, Vocabulary, last_lines, start_of, words

READ = 400
"""Characters at an answer's end of which the words are read."""
_LONGEST = 20_000
"""Characters of code that are parsed."""
_SHORT_NAME, _SHORT_LINE, _FEW, _VERY_FEW = 3, 3, 6, 2
_HALF, _USUAL = 0.5, 0.05
_COPIED = 12
"""Characters at the end of an answer that are looked up in its question."""
_MOST_ITEMS = 20
_LAST = 8
"""Characters at the end of an answer that may be one emoji."""
_FINISHED = ".!?。！？؟۔।॥።։။។"  # noqa: RUF001 (they are of other scripts)
_EMOJI = re.compile(r"[\u2600-\u27bf\u2b50\u2b55\U0001f000-\U0001faff][\ufe0f\u200d\u20e3\U0001f3fb-\U0001f3ff]*\Z")
_FENCE = "```"
_QUOTES = "\"'”’`»"  # noqa: RUF001 (likewise)
_CLOSED = _FINISHED + _QUOTES + ")]}…）】」』*>|"  # noqa: RUF001 (likewise)
_GOES_ON = ",:;([{-—/=+*&、，："  # noqa: RUF001 (likewise)
_OPEN = {"(": ")", "[": "]", "{": "}"}
_SENTENCE = re.compile(r"[.!?]\s|[。！？]")  # noqa: RUF001 (likewise)
ITEM = re.compile(r"\s*(?:[-+*•]|\d+[.)-])")
_SUM = re.compile(r"(-?[\d,]*\.?\d+)\s*([-+*/x×÷])\s*[$€£]?\s*(-?[\d,]*\.?\d+)\s*=\s*[$€£]?\s*(-?[\d,]*\.?\d+)$")  # noqa: RUF001 (signs of sums)
_RESULT = re.compile(r"=\s*[$€£]?[\d.,]+$")
_OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "/": operator.truediv,
    "÷": operator.truediv,
    **dict.fromkeys("*x×", operator.mul),  # noqa: RUF001 (likewise)
}
_CODE = re.compile(
    r"[;{}]\s*$|^\s*\w+ ?[-+*/]?= ?\S|^\s*</?\w|\w\(.*\)\s*$"
    r"|^\s*(?:def|class|import|from|for|while|if|else|return|print|var|let|const|function|public|int|end|#include|select)\b",
    re.IGNORECASE,
)
_TAG, _CLOSED_TAG = re.compile(r"<[a-z]\w*", re.IGNORECASE), re.compile(r"</|/>")
_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_ASKED = re.compile(rf"\b(\d{{1,2}}|{'|'.join(_NUMBERS)})\s+(?:\w+\s){{0,2}}?\w+s\b", re.IGNORECASE)


def is_finished(answer: str) -> bool:
    """Whether an answer ends with a sentence, an emoji or a block of code."""
    text = answer.rstrip()
    return text.endswith((*_FINISHED, _FENCE)) or _EMOJI.search(text[-_LAST:]) is not None


def describe(answer: str, question: str, own: Own, known: Vocabulary) -> dict[str, float]:
    """Returns the features of an answer's end by their names. `own`: what the vocabulary counted of the answer, before
    it was cut to learn from."""
    text = answer.rstrip()
    lines, found = last_lines(text), words(text[-READ:])
    figures = _end(text, found) | _brackets(text, lines) | _style(text, lines, known.prose(found))
    figures |= _lines(text, lines) | _code(text, lines) | _sums(text, lines) | _asked(text, question, lines)
    figures |= _habits(text, lines, own, known) | _word(text, question, found, own, known)
    code, letter, sums = figures["code"], text[-1].isalpha(), figures["sums"]
    figures |= {
        "letter in code": code and letter,
        "letter in sentences": not code and letter and len(found) > _FEW,
        "digit in sentences": not code and text[-1].isdigit() and len(found) > _FEW,
        "part of a word outside code": figures["part of a word"] and not code,
        "sums without the usual last line": sums and not code and not figures["usual last line"],
        "lines without the usual last line": figures["lines"] * (not figures["usual last line"]),
    }
    return {name: float(figure) for name, figure in figures.items()}


def _end(text: str, found: Sequence[str]) -> dict[str, float]:
    last = text[-1]
    return {
        "finished": last in _FINISHED,
        "closed": last in _CLOSED,
        "full stop": last == ".",
        "quote": last in _QUOTES,
        "letter": last.isalpha(),
        "digit": last.isdigit(),
        "goes on": last in _GOES_ON,
        "comma": last == ",",
        "colon": last == ":",
        "operator": last in "=+*/",
        "opening": last in "($£€#",
        "commas": text.count(",") / max(1, len(text)) * (last not in _CLOSED),
        "few words": len(found) <= _FEW,
        "very few words": len(found) <= _VERY_FEW,
        "length": math.log1p(len(text)),
    }


def _brackets(text: str, lines: Sequence[str]) -> dict[str, float]:
    """Returns what is open at the end: brackets, quotes, marks of code and emphasis, a tag, a table's row."""
    cells = [max(line.count(mark) for mark in "|\t") for line in lines[-3:]]
    return {
        **{f"open {opened}": text.count(opened) > text.count(closed) for opened, closed in _OPEN.items()},
        "open in the line": lines[-1].count("(") > lines[-1].count(")"),
        "open quote": text.count('"') % 2,
        "open quote in the line": lines[-1].count('"') % 2,
        "open curved quote": text.count("“") > text.count("”"),
        "open code": text.count("`") % 2,
        "open emphasis": text.count("**") % 2,
        "open row": len(cells) > 2 and cells[-1] < cells[-2] == cells[-3],
    }


def _style(text: str, lines: Sequence[str], prose: float) -> dict[str, float]:
    """Returns whether the answer is written in sentences, and if so how it ends."""
    open_end, sentences = text[-1] not in _CLOSED, len(_SENTENCE.findall(text[-READ:-1]))
    return {
        "prose": prose,
        "prose, open": prose * open_end,
        "no prose, open": (1 - prose) * open_end,
        "prose in one line, open": prose * (len(lines) == 1) * open_end,
        "sentences": math.log1p(sentences),
        "sentences, open": sentences > 0 and open_end,
        "signs, open": bool(set(text) & set("=+*/\\<>|^")) * open_end,
    }


def _lines(text: str, lines: Sequence[str]) -> dict[str, float]:
    """Returns how the last line compares with the lines before."""
    *before, last = lines
    finished = _mean([line[-1] in _FINISHED for line in before], 0.5)
    open_end, listed = text[-1] not in _FINISHED, bool(ITEM.match(last)) and len(lines) > 1
    several = before if len(before) > 1 else [last]
    sizes, worded, count = sorted(map(len, several)), _mean([line[-1].isalnum() for line in several]), len(words(last))
    return {
        "finished lines": finished,
        "finished lines, open": finished * open_end,
        "item": listed,
        "item like others": listed and finished < _HALF,
        "item like others, open": listed and finished < _HALF and open_end,
        "lines": math.log1p(len(lines)),
        "last line": math.log1p(len(last)),
        "words of the last line": math.log1p(count),
        "short last line": count <= _SHORT_LINE,
        "one word in the last line": len(lines) > 1 and count == 1,
        "shortest line": len(last) < sizes[0] / 2,
        "last line to the others": math.log((len(last) + 1) / (sizes[len(sizes) // 2] + 1)),
        "lines end with words": worded,
        "ends like the lines": last[-1].isalnum() - worded,
    }


def _code(text: str, lines: Sequence[str]) -> dict[str, float]:
    """Returns whether the answer looks like code, and whether it is whole."""
    share = _mean([bool(_CODE.search(line)) for line in lines])
    code = share >= _HALF
    depth = sum(text.count(opened) - text.count(closed) for opened, closed in _OPEN.items())
    tags = len(_TAG.findall(text)) - len(_CLOSED_TAG.findall(text)) if code and "<" in text else 0
    return {
        "code share": share,
        "code": code,
        "code that parses": code and _parses(text),
        "code, open": code and depth > 0,
        "code, closed": code and depth == 0,
        "code, closed, ends with a word": code and depth == 0 and text[-1].isalnum(),
        "tags, open": tags > 0,
        "tags, closed": code and "<" in text and tags <= 0,
    }


def _parses(text: str) -> bool:
    """Whether the text is whole as Python."""
    if len(text) > _LONGEST:
        return False
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _sums(text: str, lines: Sequence[str]) -> dict[str, float]:
    correct, begun = read_sum(text)
    return {
        "correct sum": correct,
        "part of a result": begun,
        "result": bool(_RESULT.search(lines[-1])),
        "sums": math.log1p(text.count("=")),
    }


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


def _asked(text: str, question: str, lines: Sequence[str]) -> dict[str, float]:
    """Returns whether the answer breaks off in what it copies from its question, and has as many items as asked for."""
    tail = text[-_COPIED:]
    at = question.find(tail) if len(tail) == _COPIED else -1
    following = question[at + _COPIED : at + _COPIED + 1] if at >= 0 else "-"
    items, commas = sum(bool(ITEM.match(line)) for line in lines), text.count(",") + 1
    asked = items_asked(question[-1000:])
    return {
        "copies a part of a word": following.isalpha(),
        "copies before a word": following in {" ", ","},
        "copies to an end": not following or following in ".!?\n\"'",
        "items": math.log1p(items),
        "items as asked": items in asked or (not items and commas in asked),
        "fewer items than asked": bool(asked) and 0 < items < min(asked),
        "length to the question": math.log((len(text) + 5) / (len(question) + 5)),
    }


def items_asked(question: str) -> set[int]:
    """Returns the numbers of things that a question names, such as 3 in "three tips"."""
    found = {_NUMBERS.get(number.lower()) or int(number) for number in _ASKED.findall(question)}
    return {number for number in found if 1 < number <= _MOST_ITEMS}


def _habits(text: str, lines: Sequence[str], own: Own, known: Vocabulary) -> dict[str, float]:
    """Returns whether other answers end with such a line and such a character, and are as short."""
    start = start_of(lines[-1])
    last, inner = known.line_starts(start, own)
    return {
        "last line begins like last lines": math.log((last + 0.5) / (inner + 0.5 + 0.02 * known.counted)),
        "usual last line": last > _USUAL * known.counted,
        "line begins like inner lines": inner > 3 * last + 2,
        "answers end with the character": math.log((known.final_characters(text, own) + 0.5) / (known.counted + 1)),
        "rank of the length": known.rank_of_length(len(text)),
    }


def _word(text: str, question: str, found: Sequence[str], own: Own, known: Vocabulary) -> dict[str, float]:
    """Returns features of the last word."""
    last = found[-1] if found and text[-1].isalnum() else ""
    before, name, followed = found[:-1], bool(last) and text[-len(last) :][:1].isupper(), known.is_followed(last)
    return {
        **known.describe(before, last, own, question),
        **known.look_up(last, is_name=name),
        "part of a word": known.breaks_off(text, question, found),
        "length of the word": len(last),
        "followed": followed,
        "followed in a sentence": followed and len(found) > _FEW,
        "after a followed word": bool(last and before) and known.is_followed(before[-1]),
        "lacks its s": bool(last and before) and known.lacks_its_s(last, before),
        "letter by itself": len(last) == 1 and last.isalpha() and last not in LETTERS,
        "name": name,
        "short name": name and len(last) <= _SHORT_NAME,
    }


def _mean(figures: Sequence[float], default: float = 0.0) -> float:
    return sum(figures) / len(figures) if figures else default
