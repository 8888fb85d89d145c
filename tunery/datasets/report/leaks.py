"""Rows of the file that stand in the file it is compared with, as a whole or by the question alone."""

from collections.abc import Iterator
from itertools import chain

from tunery.datasets.report import extensions, texts
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.neighbours import Pair

_ACTION = "Drop the row here, or its partner in the other file."


def find(case: Case) -> Iterator[Finding]:
    """One finding for each row that leaks, by its closest partner."""
    closest: dict[int, Pair] = {}
    # A few words more make short questions unlike by their shingles: with one answer they leak all the same.
    for pair in chain(case.pairs, extensions.find(case.answered, case.against)):
        if pair.leaked and pair.similarity > getattr(closest.get(pair.first.line), "similarity", 0):
            closest[pair.first.line] = pair
    for line, pair in sorted(closest.items()):
        yield Finding("test_leak", [line], pair.similarity, _why(pair), _ACTION, [pair.second.line])


def _why(pair: Pair) -> str:
    asked = "the question" if pair.similarity == 1 else "nearly the question"
    answered = texts.squash(pair.first.answer) == texts.squash(pair.second.answer)
    return f"Has {asked} of line {pair.second.line} there, with {'the same' if answered else 'another'} answer."
