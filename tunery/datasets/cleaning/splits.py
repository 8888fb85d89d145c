"""Chooses the rows that a cleaning holds out: whole groups of similar questions, and the same share of every label."""

import random
from collections.abc import Iterator, Sequence

from tunery.datasets.errors import CannotHoldOut
from tunery.datasets.report import extensions, groups
from tunery.datasets.report.case import Case
from tunery.datasets.report.rows import Row, by_key, whole

Group = list[int]


def hold_out(rows: Sequence[Row], *, fraction: float, seed: int) -> set[int]:
    """Returns the lines to hold out, about this fraction of the rows, one or more. Raises CannotHoldOut if none can."""
    case = Case(rows)
    linked = group(case)
    strata: dict[str, list[Group]] = {}
    labels = case.tasks[0].labels if case.tasks else {}
    for one in linked:
        strata.setdefault(labels.get(one[0], ""), []).append(one)
    held = set(_draw(strata, fraction, seed))
    if not held:
        # A share of less than half a row, or groups that are all larger than it.
        smallest: Group = min(linked, key=len, default=[])
        held = set(smallest)
    if not held or len(held) == len(rows):
        raise CannotHoldOut(rows=len(rows))
    return held


def _draw(strata: dict[str, list[Group]], fraction: float, seed: int) -> Iterator[int]:
    """Yields the lines of random groups of each label, without exceeding the label's share."""
    due, taken = 0.0, 0
    for label in sorted(strata):
        some = strata[label]
        due += fraction * sum(map(len, some))
        for one in random.Random(f"{seed} {label}").sample(some, len(some)):  # noqa: S311 (draws rows)
            if taken + len(one) <= round(due):
                taken += len(one)
                yield from one


def group(case: Case) -> list[Group]:
    """Returns the lines in groups: rows that are the same, or that a chain of similar questions links."""
    same = [(rows[0].line, row.line) for rows in by_key(case.rows, whole).values() for row in rows[1:]]
    near = [(pair.first.line, pair.second.line) for pair in case.pairs if not pair.leaked]
    # The report would count these as leaks between the two files.
    longer = [(pair.first.line, pair.second.line) for pair in extensions.find(case.answered, case.answered)]
    found: dict[int, Group] = {}
    for line, first in groups.join((row.line for row in case.rows), (*same, *near, *longer)).items():
        found.setdefault(first, []).append(line)
    return list(found.values())
