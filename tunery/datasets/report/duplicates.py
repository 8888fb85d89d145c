"""Finds exact and near duplicates of rows."""

from collections.abc import Iterator

from tunery.datasets.report import texts
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.rows import by_key, whole

NEAR_ANSWER = 0.8


def find_exact(case: Case) -> Iterator[Finding]:
    """Finds rows that are equal, ignoring case and whitespace."""
    for rows in by_key((row for row in case.rows if row.turns), whole).values():
        if len(rows) > 1:
            lines = [row.line for row in rows]
            yield Finding("exact_duplicate", lines, 1.0, "The rows are the same.", f"Keep only line {lines[0]}.")


def find_near(case: Case) -> Iterator[Finding]:
    """Finds rows whose questions and answers are similar."""
    exact = case.lines_found("exact_duplicate")
    for first, second, similarity, leaked in case.pairs:
        if leaked or (first.line in exact and second.line in exact and whole(first) == whole(second)):
            continue
        answers = texts.similarity(texts.words(first.answer), texts.words(second.answer))
        same = texts.squash(first.answer) == texts.squash(second.answer)
        if same or (answers >= NEAR_ANSWER and texts.load_json(first.answer) is None):
            lines = sorted((first.line, second.line))
            why = "Questions and answers are nearly the same."
            yield Finding("near_duplicate", lines, min(similarity, 1.0 if same else answers), why, "Keep one of them.")
