"""Finds rows that are also in the file that it is compared with, as a whole or only by the question."""

from collections.abc import Iterator
from itertools import chain

from tunery.datasets.report import extensions, texts
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.neighbours import Pair

_ACTION = "Drop this row, or its counterpart in the other file."


def find(case: Case) -> Iterator[Finding]:
    """Yields a finding for each leaked row, with its closest match."""
    closest: dict[int, Pair] = {}
    # A few added words make short questions dissimilar by shingles; with the same answer they are still leaks.
    for pair in chain(case.pairs, extensions.find(case.answered, case.against)):
        if pair.leaked and pair.similarity > getattr(closest.get(pair.first.line), "similarity", 0):
            closest[pair.first.line] = pair
    for line, pair in sorted(closest.items()):
        yield Finding("test_leak", [line], pair.similarity, _why(pair), _ACTION, [pair.second.line])


def _why(pair: Pair) -> str:
    what = "text" if pair.first.is_plain else "question"
    asked = f"the {what}" if pair.similarity == 1 else f"nearly the {what}"
    if pair.first.is_plain:
        return f"Has {asked} of line {pair.second.line} of the other file."
    answered = texts.squash(pair.first.answer) == texts.squash(pair.second.answer)
    return (
        f"Has {asked} of line {pair.second.line} of the other file, with "
        f"{'the same' if answered else 'a different'} answer."
    )
