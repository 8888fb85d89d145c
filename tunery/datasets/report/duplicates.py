"""Finds exact and near duplicates of rows."""

from collections.abc import Iterator, Set

from tunery.datasets.report import sameness, shingles, texts
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.labels import LONGEST
from tunery.datasets.report.neighbours import Pair
from tunery.datasets.report.rows import by_key, whole

NEAR_ANSWER = 0.8


def find_exact(case: Case) -> Iterator[Finding]:
    """Finds rows that are equal, ignoring case and whitespace."""
    for rows in by_key((row for row in case.rows if row.turns), whole).values():
        if len(rows) > 1:
            lines = [row.line for row in rows]
            yield Finding("exact_duplicate", lines, 1.0, "The rows are the same.", "Keep only the first of them.")


def find_near(case: Case) -> Iterator[Finding]:
    """Finds rows whose questions and answers are similar."""
    exact = case.lines_found("exact_duplicate")
    pairs = [pair for pair in case.pairs if not (pair.leaked or _are_equal(pair, exact))]
    answered = {row.line: row.answer or row.question for pair in pairs for row in (pair.first, pair.second)}
    words = {line: _said(answer) for line, answer in answered.items()}
    answers = shingles.similarities([(words[pair.first.line], words[pair.second.line]) for pair in pairs])
    for pair, similarity in zip(pairs, answers, strict=True):
        if similarity >= NEAR_ANSWER and _may_be_near(pair):
            lines = sorted((pair.first.line, pair.second.line))
            why = f"{'Texts' if pair.first.is_plain else 'Questions and answers'} are nearly the same."
            yield Finding("near_duplicate", lines, min(pair.similarity, similarity), why, "Keep one of them.")


def _said(answer: str) -> str:
    """Returns the words of an answer, and of a short one the signs too: in a long one they may be its layout."""
    return (texts.words_and_signs if len(answer) <= LONGEST else texts.words)(answer)


def _have_one_system(pair: Pair) -> bool:
    """Whether the system messages say the same, or one row has none."""
    one, other = pair.first.system, pair.second.system
    return one == other or not one or not other or sameness.ask_the_same(*map(sameness.sentences, (one, other)))


def _are_equal(pair: Pair, exact: Set[int]) -> bool:
    first, second = pair.first, pair.second
    return first.line in exact and second.line in exact and whole(first) == whole(second)


def _may_be_near(pair: Pair) -> bool:
    """Whether answers that are similar are so in meaning. Those in JSON may differ in a label alone, and rows of pairs
    in the other answer; those with other tools have other questions, and so have those under other instructions."""
    if not _have_one_system(pair):
        return False
    if texts.squash(pair.first.rejected) != texts.squash(pair.second.rejected) or pair.first.tools != pair.second.tools:
        return False
    first, second = pair.first.answer, pair.second.answer
    return texts.load_json(first) is None or texts.squash(first) == texts.squash(second)
