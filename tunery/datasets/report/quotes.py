"""Finds values of answers that their question does not have, where nearly all answers quote the question."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunery.datasets.report import labels, texts
from tunery.datasets.report.case import Case

_LEAST, _SHARE = 40, 0.8
"""Minimum rows with a key, and the share of them whose values have to be quotes. Not nearer to 1, because a file may
have many wrong answers."""
_NEARLY_ALL = 0.95
"""The share from which a recurring value is named even if its question has no other one. Below it, as with topics that
most questions name and some describe, its absence alone means little."""
_SHOWN_ANYWAY = 0.5
"""Maximum average share of a key's other values that a question has. A question that lists the labels quotes them all,
so that a quote says nothing about the answer."""
_SAMPLED, _CLASSES = 200, 200
"""Maximum rows and recurring values that are compared for this, the most frequent values first."""
_DOUBT = 5
"""How much faster than the share of rows that quote the certainty falls: where one in ten rows does not, these rather
have another form, as a date for `tomorrow`."""
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_PARTS = re.compile(r"\d+")
_CLOCK = re.compile(r"\d\d?:\d\d(?::\d\d)?")
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve",
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf",
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze",
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce",
)
_SPELT = {word: float(at) for words in _WORDS for at, word in enumerate(words.split())}
_SPELT |= dict.fromkeys(("a", "an", "single", "ein", "eine", "einen", "einer", "une", "una"), 1.0)
_SPELT |= {"both": 2.0, "couple": 2.0, "pair": 2.0, "dozen": 12.0}


class _Question:
    """What a question says, for the search of values in it."""

    def __init__(self, text: str) -> None:
        self._text = texts.squash(text)
        self._numbers: set[float] | None = None

    def has(self, value: str) -> bool:
        """Whether the value stands in the question: a number as a number, however it is written, and a date or time by
        most of its numbers."""
        digits = value.removeprefix("-")
        if not _NUMBER.fullmatch(digits):
            return value in self._text or self._has_most(value)
        return not self._known().isdisjoint(_read(digits))

    def _has_most(self, value: str) -> bool:
        parts = [number for part in _PARTS.findall(value) if (number := float(part))]
        is_time = _CLOCK.fullmatch(value) is not None
        if not is_time and len(parts) < 2:
            return False
        known = self._known()
        there = [number for number in parts if number in known or (is_time and number - 12 in known)]
        return 2 * len(there) > len(parts)

    def _known(self) -> set[float]:
        if self._numbers is None:
            self._numbers = set(_numbers_in(self._text))
        return self._numbers


@dataclass
class _Key:
    """One key's values in the answers, and which of them are quotes, by line. `classes`: its recurring values."""

    quotes: dict[int, list[tuple[str, bool]]] = field(default_factory=dict)
    classes: Sequence[str] = ()

    def share(self) -> float:
        """Returns the share of rows whose values are all quotes."""
        return sum(all(is_there for _, is_there in values) for values in self.quotes.values()) / len(self.quotes)


@dataclass(frozen=True)
class Quotes:
    """`keys`: the keys whose values are quotes. `missing`: by line a value that the question does not have, and before
    it how certainly it is wrong: by the share of rows that quote, times that of the key's values that are missing."""

    keys: frozenset[str]
    missing: dict[int, tuple[float, str]]


def find(case: Case) -> Quotes:
    """Returns which keys of the answers quote the questions, and where a value is no quote.

    Keys are judged one by one, with all texts and numbers in a nested value; short answers that are no JSON are one.
    Of a key whose values recur, a value counts as missing where the question has another one instead.
    """
    questions = {row.line: _Question(row.question) for row in case.answered}
    keys = {key: one for key, one in _keys(case, questions).items() if _are_quotes(one, questions)}
    missing: dict[int, tuple[float, str]] = {}
    for one in keys.values():
        share = one.share()
        certainty = max(0.0, 1 - _DOUBT * (1 - share))
        everywhere = not one.classes or share >= _NEARLY_ALL
        for line, values in one.quotes.items():
            lost = [text for text, is_there in values if not is_there]
            if lost and (everywhere or _any_other(values, one.classes, questions[line])):
                missing[line] = max(missing.get(line, (0.0, "")), (certainty * len(lost) / len(values), lost[0]))
    return Quotes(frozenset(keys), missing)


def _keys(case: Case, questions: Mapping[int, _Question]) -> dict[str, _Key]:
    classes = {task.key: _most_frequent(task.labels.values()) for task in case.tasks}
    found: dict[str, _Key] = {}
    for row in case.answered:
        for key, value in _fields(row.answer, classes):
            if values := [text for text in map(texts.squash, _texts(value)) if text]:
                one = found.setdefault(key, _Key(classes=classes.get(key, ())))
                one.quotes[row.line] = [(text, questions[row.line].has(text)) for text in values]
    return found


def _fields(answer: str, classes: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    parsed = texts.load_json(answer)
    if isinstance(parsed, Mapping):
        return parsed.items()
    is_label = parsed is None and labels.TEXT in classes and len(answer) <= labels.LONGEST
    return [(labels.TEXT, answer)] if is_label else []


def _most_frequent(values: Iterable[str]) -> list[str]:
    return [value for value, _ in Counter(values).most_common(_CLASSES)]


def _are_quotes(key: _Key, questions: Mapping[int, _Question]) -> bool:
    if len(key.quotes) < _LEAST or key.share() < _SHARE:
        return False
    return not key.classes or _others(key, questions) <= _SHOWN_ANYWAY


def _others(key: _Key, questions: Mapping[int, _Question]) -> float:
    """Returns the average share of the other recurring values that a question has."""
    shares = []
    for line in list(key.quotes)[:: -(-len(key.quotes) // _SAMPLED)]:
        own = {text for text, _ in key.quotes[line]}
        others = [text for text in key.classes if text not in own]
        shares.append(sum(map(questions[line].has, others)) / max(1, len(others)))
    return sum(shares) / len(shares)


def _any_other(values: Sequence[tuple[str, bool]], classes: Sequence[str], question: _Question) -> bool:
    own = {text for text, _ in values}
    return any(text not in own and question.has(text) for text in classes)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield repr(value)
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _numbers_in(text: str) -> Iterator[float]:
    yield from (_SPELT[word] for word in texts.words(text).split() if word in _SPELT)
    for match in _NUMBER.finditer(text):
        yield from _read(match[0])


def _read(number: str) -> Iterator[float]:
    """Yields what a number may mean: its separators may be of thousands or of decimals."""
    for written in {number.replace(",", ""), number.replace(".", "").replace(",", ".")}:
        if written.count(".") <= 1:
            yield float(written)
