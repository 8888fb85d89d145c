"""Finds rows that answer similar questions with different labels."""

from collections.abc import Iterator

from tunery.datasets.report import texts
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.neighbours import Pair

_ACTION = "Keep the correct row, and correct or drop the other."


def find(case: Case) -> Iterator[Finding]:
    """Finds pairs of similar questions, under the same system message, with different labels."""
    for pair in case.pairs:
        if pair.leaked or not _same_instructions(pair):
            continue
        for task in case.tasks:
            one, other = task.labels.get(pair.first.line), task.labels.get(pair.second.line)
            if one is not None and other is not None and one != other:
                lines = sorted((pair.first.line, pair.second.line))
                asked = "the same question" if pair.similarity == 1 else "nearly the same question"
                why = f"For {asked} {task.name} is '{one}' in one row and '{other}' in the other."
                yield Finding("contradiction", lines, pair.similarity, why, _ACTION)
                break


def _same_instructions(pair: Pair) -> bool:
    """Whether two rows have the same system message; one without it, or with wrong roles, counts as the same."""
    one, other = texts.squash(pair.first.system), texts.squash(pair.second.system)
    return one == other or not one or not other
