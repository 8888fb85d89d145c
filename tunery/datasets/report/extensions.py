"""Finds pairs of questions where one is the other with a few words before or after it, such as a greeting."""

from collections.abc import Iterator, Sequence

from tunery.datasets.report import shingles, texts
from tunery.datasets.report.neighbours import Pair
from tunery.datasets.report.rows import Row, by_key

_ADDED = 3
"""Maximum words that the longer question adds."""
_LEAST = 3
"""Minimum words of the shorter question: fewer occur in many questions about something else."""
_MOST = 30
"""Maximum words of the longer question: longer ones are similar enough to be found by their shingles."""
_ALIKE = 0.55
"""Minimum Jaccard similarity of the questions' shingles, so that less is added than shared."""


def find(rows: Sequence[Row], against: Sequence[Row]) -> Iterator[Pair]:
    """Yields pairs of a row and one of `against` with the same answer, where one question extends the other.

    Of rows with themselves each pair comes once.
    """
    here = by_key(rows, _words)
    there = here if against is rows else by_key(against, _words)
    pairs = list(_extended(here, there))
    if there is not here:
        pairs += [(first, second) for second, first in _extended(there, here)]
    for (first, second), similarity in zip(pairs, shingles.similarities(pairs), strict=True):
        if similarity >= _ALIKE:
            yield from _pair(here[first], there[second], similarity)


def _words(row: Row) -> str:
    return texts.words(row.question)


def _extended(longer: dict[str, list[Row]], shorter: dict[str, list[Row]]) -> Iterator[tuple[str, str]]:
    """Yields each question of `longer` with one of `shorter` that it extends."""
    for question in longer:
        parts = question.split()
        for part in _parts(parts) if len(parts) <= _MOST else ():
            if part in shorter and texts.numbers(part) == texts.numbers(question):
                yield question, part


def _parts(words: list[str]) -> Iterator[str]:
    """Yields the runs of words that are up to _ADDED words shorter."""
    for size in range(max(_LEAST, len(words) - _ADDED), len(words)):
        yield from (" ".join(words[at : at + size]) for at in range(len(words) - size + 1))


def _pair(rows: Sequence[Row], against: Sequence[Row], similarity: float) -> Iterator[Pair]:
    answers = {texts.squash(row.answer): row for row in against}
    for row in rows:
        if (other := answers.get(texts.squash(row.answer))) is not None:
            yield Pair(row, other, similarity, True)
