"""Finds equal and similar questions: candidates by MinHash, each compared exactly."""

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from tunery.datasets.report import candidates, sameness, shingles, texts
from tunery.datasets.report.rows import Row

NEAR = 0.7
"""Jaccard similarity of three-character shingles: a greeting or a changed word in a short question stays above it,
other questions about the same thing do not, but for those that share a template or a context (`sameness`)."""
_MOST = 5
"""Maximum earlier rows with a similar question that a row is paired with: in a file made from one template, all are."""

_TRIED = 10
"""Similar questions of one that are looked at for whether they ask the same."""
_COMPARED = 10
"""Candidates of a question that are compared at a time."""


class Pair(NamedTuple):
    """Two rows with similar questions; `leaked`: `second` is of the other file. `similarity`: 1 for the same words."""

    first: Row
    second: Row
    similarity: float
    leaked: bool


class _Question(NamedTuple):
    """One question, its sentences, and the rows that ask it, of the file and of the other one."""

    key: str
    sentences: list[str]
    rows: list[Row]
    against: list[Row]

    def without(self, instructions: frozenset[str]) -> "_Question":
        """Returns the question without the sentences that are an instruction to many; whole if it has no others."""
        own = [sentence for sentence in self.sentences if sentence not in instructions]
        return self._replace(key=" ".join(own), sentences=own) if own else self


def find(rows: Sequence[Row], against: Sequence[Row] = ()) -> list[Pair]:
    """Returns pairs of rows with equal or similar questions, each once: a row and up to _MOST earlier ones of the file,
    a row and the one of the other file whose question is the most similar."""
    questions = _group(rows, against)
    near, leaked = _near(questions)
    pairs = [pair for question in questions for pair in _inside(question)]
    for place, similar in groupby(near, key=lambda one: one.question):
        earlier = [(questions[one.partner], one.similarity) for one in similar]
        pairs += _between(earlier, questions[place])
    for one in leaked:
        there = questions[one.partner].against[0]
        pairs += (Pair(row, there, one.similarity, True) for row in questions[one.question].rows)
    return pairs


def _group(rows: Sequence[Row], against: Sequence[Row]) -> list[_Question]:
    questions: dict[str, _Question] = {}
    for side, source in enumerate((rows, against)):
        for row in source:
            key = texts.asked(row.question)
            if (question := questions.get(key)) is None:
                question = questions[key] = _Question(key, sameness.sentences(row.question), [], [])
            (question.against if side else question.rows).append(row)
    return list(questions.values())


def _inside(question: _Question) -> Iterator[Pair]:
    """Yields each row of a question with the first one, and with the first that has the same instructions."""
    firsts: dict[tuple[str, tuple[str, ...]], Row] = {}
    for row in question.rows if len(question.rows) > 1 else ():
        first = firsts.setdefault((texts.squash(row.system), row.tools), row)
        if row is not question.rows[0]:
            yield Pair(question.rows[0], row, 1.0, False)
        if first is not row and first is not question.rows[0]:
            yield Pair(first, row, 1.0, False)
    yield from (Pair(row, question.against[0], 1.0, True) for row in question.rows if question.against)


def _between(earlier: Sequence[tuple[_Question, float]], later: _Question) -> Iterator[Pair]:
    """Yields each row of a question with the first rows of the similar ones before it."""
    for row in later.rows:
        firsts = ((first, similarity) for question, similarity in earlier for first in question.rows)
        yield from (Pair(first, row, similarity, False) for first, similarity in islice(firsts, _MOST))


class _Similar(NamedTuple):
    """A question and one that is similar to it, by index."""

    question: int
    partner: int
    similarity: float


def _near(questions: Sequence[_Question]) -> tuple[list[_Similar], list[_Similar]]:
    """Returns questions of the file with the first similar ones before them, and those that this file alone asks with
    the most similar one of the other file. Similar questions name the same numbers, and have the same instructions."""
    instructions = sameness.instructions(question.sentences for question in questions)
    own = [question.without(instructions) for question in questions]
    table = shingles.table([question.key for question in own])
    sketches, groups = shingles.sketches(table, candidates.LENGTH), _groups(questions, instructions)
    here = np.array([bool(question.rows) for question in questions], bool)
    there = np.array([bool(question.against) for question in questions], bool)
    earlier, later = candidates.find(sketches, groups, here, here)
    near = _same(own, _similar(table, earlier, later, earlier, _TRIED))
    leaks, asked = candidates.find(sketches, groups, there, here & ~there)
    leaked = _same(own, _similar(table, leaks, asked, -candidates.likeness(sketches, leaks, asked), _TRIED))
    return _first(near, near[0], _MOST), _first(leaked, -leaked[2], 1)


def _groups(questions: Sequence[_Question], instructions: frozenset[str]) -> NDArray[np.int64]:
    """Returns a number for each question, which those that name the same numbers with the same instructions share."""
    known: dict[tuple[str, ...], int] = {}
    named = ((*texts.numbers(one.key), *sorted(instructions.intersection(one.sentences))) for one in questions)
    return np.array([known.setdefault(shared, len(known)) for shared in named], np.int64)


_Found = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Partners, the questions that they are similar to, and the similarities."""


def _similar(
    table: csr_matrix, partners: NDArray[np.int64], asked: NDArray[np.int64], rank: NDArray[Any], enough: int
) -> _Found:
    """Returns similar ones of the pairs. Those of the least rank are compared first, and others only of questions that
    have not `enough` yet, as comparing takes the most time where all questions are similar."""
    order = np.lexsort((rank, asked))
    partners, asked = partners[order], asked[order]
    turns = _turns(asked) // _COMPARED
    similarity = np.zeros(len(asked))
    counts = np.zeros(table.shape[0], np.int64)
    for turn in range(int(turns.max(initial=-1)) + 1):
        due = np.flatnonzero((turns == turn) & (counts[asked] < enough))
        similarity[due] = shingles.similarity(table, partners[due], asked[due])
        np.add.at(counts, asked[due], similarity[due] >= NEAR)
    near = similarity >= NEAR
    return partners[near], asked[near], similarity[near]


def _same(questions: Sequence[_Question], found: _Found) -> _Found:
    """Returns those of the similar ones that ask the same."""
    pairs = zip(found[0].tolist(), found[1].tolist(), strict=True)
    same = [sameness.ask_the_same(questions[one].sentences, questions[other].sentences) for one, other in pairs]
    kept = np.array(same, bool)
    return found[0][kept], found[1][kept], found[2][kept]


def _first(found: _Found, rank: NDArray[Any], most: int) -> list[_Similar]:
    """Returns the partners of the least rank of each question, ordered by question and rank."""
    order = np.lexsort((rank, found[1]))
    partners, asked, similarity = found[0][order], found[1][order], found[2][order]
    kept = _turns(asked) < most
    return list(map(_Similar, *(some[kept].tolist() for some in (asked, partners, similarity))))


def _turns(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns how many equal ones are before each of the sorted places."""
    return np.arange(len(places)) - np.searchsorted(places, places)
