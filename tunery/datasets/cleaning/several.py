"""The rule for findings about several rows, which cleanings and the count of usable rows share."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from tunery.datasets.cleaning.order import OF_SEVERAL, Action
from tunery.datasets.report.case import Finding


class Surplus(NamedTuple):
    """A row to drop by a finding about several rows, and one of the others."""

    line: int
    finding: Finding
    beside: int


def surplus(findings: Sequence[Finding], actions: Mapping[str, Action], gone: Collection[int]) -> Iterator[Surplus]:
    """Yields the rows to drop: all of a finding, or all but the first, if at least two of them are left.

    `gone`: the rows that are dropped already. Add each yielded row to it before the next one is taken. Where no row is
    kept, rows that go by findings of the same kind count as left, as two findings may share a row.
    """
    for kind in OF_SEVERAL:
        keeps_one = kind in actions and actions[kind].action == "keep_one"
        excluded = gone if keeps_one else frozenset(gone)
        for finding in (finding for finding in findings if finding.kind == kind):
            left = [line for line in finding.lines if line not in excluded]
            if len(left) > 1:
                for line in left[keeps_one:]:
                    yield Surplus(line, finding, left[0] if line != left[0] else left[1])
