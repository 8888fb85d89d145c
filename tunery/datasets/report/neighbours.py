"""Finds equal and similar questions: candidates by MinHash, each compared exactly."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from rensa import RMinHash, RMinHashLSH

from tunery.datasets.report import texts
from tunery.datasets.report.rows import Row

NEAR = 0.7
"""Jaccard similarity of three-character shingles: a greeting or a changed word in a short question stays above it,
other questions about the same thing do not."""
_PERMUTATIONS, _BANDS, _SEED = 120, 24, 7  # bands of five: a pair at NEAR is seen with a probability of 0.988
_BATCH = 2000
_MOST = 40
"""Maximum candidates per question, so that a file made from one template does not take quadratic time."""
_SHOWN = 20
"""Maximum rows with the same question that are paired with another row, for the same reason."""


class Pair(NamedTuple):
    """Two rows with similar questions; `leaked`: `second` is of the other file. `similarity`: 1 for the same words."""

    first: Row
    second: Row
    similarity: float
    leaked: bool


class _Question(NamedTuple):
    """One question and the rows that ask it, of the file and of the other one. `size`: its different shingles."""

    key: str
    size: int
    rows: list[Row]
    against: list[Row]


def find(rows: Sequence[Row], against: Sequence[Row] = ()) -> list[Pair]:
    """Returns the pairs of similar questions, each once: within the file, and between the two files."""
    questions = _group(rows, against)
    pairs = [pair for question in questions for pair in _inside(question)]
    for first, second, similarity in _near(questions):
        pairs += _between(questions[first], questions[second], similarity)
    return pairs


def _group(rows: Sequence[Row], against: Sequence[Row]) -> list[_Question]:
    questions: dict[str, _Question] = {}
    for side, source in enumerate((rows, against)):
        for row in source:
            key = texts.words(row.question) or texts.squash(row.question)
            if key not in questions:
                questions[key] = _Question(key, len(texts.shingles(key)), [], [])
            (questions[key].against if side else questions[key].rows).append(row)
    return list(questions.values())


def _inside(question: _Question) -> Iterator[Pair]:
    rows, against = question.rows, question.against
    if rows:
        yield from (Pair(rows[0], row, 1.0, False) for row in rows[1:])
        yield from (Pair(row, against[0], 1.0, True) for row in rows if against)


def _between(one: _Question, other: _Question, similarity: float) -> Iterator[Pair]:
    for first in one.rows[:_SHOWN]:
        yield from (Pair(first, second, similarity, False) for second in other.rows[:_SHOWN])
    for asked, kept in ((one, other), (other, one)):
        if kept.against:
            yield from (Pair(row, kept.against[0], similarity, True) for row in asked.rows)


def _near(questions: Sequence[_Question]) -> Iterator[tuple[int, int, float]]:
    """Yields the pairs of different questions, by index, that are similar and name the same numbers."""
    index = RMinHashLSH(threshold=NEAR, num_perm=_PERMUTATIONS, num_bands=_BANDS)
    keys = iter(enumerate(question.key for question in questions))
    while batch := list(islice(keys, _BATCH)):
        hashes = RMinHash.from_token_sets([texts.shingles(key) for _, key in batch], _PERMUTATIONS, _SEED)
        for (place, key), candidates in zip(batch, index.query_all(hashes), strict=True):
            yield from _compare(place, key, candidates, questions)
        within = RMinHashLSH(threshold=NEAR, num_perm=_PERMUTATIONS, num_bands=_BANDS)
        within.insert_many(hashes, start_key=batch[0][0])
        for (place, key), candidates in zip(batch, within.query_all(hashes), strict=True):
            yield from _compare(place, key, [other for other in candidates if other < place], questions)
        index.insert_many(hashes, start_key=batch[0][0])


def _compare(
    place: int, key: str, candidates: Sequence[int], questions: Sequence[_Question]
) -> Iterator[tuple[int, int, float]]:
    size = questions[place].size
    close = (other for other in candidates if NEAR * size <= questions[other].size <= size / NEAR)
    named = texts.numbers(key)
    for other in islice(close, _MOST):
        text = questions[other].key
        similarity = texts.similarity(key, text)
        if similarity >= NEAR and texts.numbers(text) == named:
            yield other, place, similarity
