"""Finds answers in another format than nearly all others: not JSON, or with other keys."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tunery.datasets.report import texts
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.rows import Row, by_key

_FRACTION = 0.9
_LEAST = 20
"""Rows with one system message below which shares say nothing."""
_ACTION = "Write the answer in the format of the others."


def find(case: Case) -> Iterator[Finding]:
    """Finds rows whose answer differs in format from at least nine in ten with the same system message."""
    named = case.lines_found("empty_output", "truncated_output", "wrong_roles")
    rows = [row for row in case.answered if row.line not in named]
    for group in by_key(rows, lambda row: texts.squash(row.system)).values():
        if len(group) >= _LEAST:
            yield from _odd_ones([(row, texts.load_json(row.answer)) for row in group])


def _odd_ones(group: list[tuple[Row, Any]]) -> Iterator[Finding]:
    objects = [(row, value) for row, value in group if isinstance(value, dict)]
    fraction = len(objects) / len(group)
    if fraction < _FRACTION:
        return
    usual, count = Counter(frozenset(value) for _, value in objects).most_common(1)[0]
    for row, value in group:
        if not isinstance(value, dict):
            why = f"{fraction:.1%} of the answers under this system message are JSON objects, but this one is not."
            yield Finding("inconsistent_output", [row.line], fraction, why, _ACTION)
        elif count >= _FRACTION * len(objects) and (differing := usual ^ frozenset(value)):
            keys = ", ".join(sorted(differing)[:3])
            why = f"{count / len(objects):.1%} of the answers have the same keys, but this one differs in: {keys}."
            yield Finding("inconsistent_output", [row.line], count / len(objects), why, _ACTION)
