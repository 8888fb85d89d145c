"""Finds what separates the columns of a table whose header has several signs that may."""

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import islice

PIPE = "|"
"""Found, to be refused: it also stands in texts, so a table of pipes alone is not recognised by its header."""
_SIGNS = f"\t,;{PIPE}"
_QUOTED = re.compile(r'"[^"]*"')
_SAMPLED = 20


def find(lines: Sequence[str]) -> str | None:
    """Returns the sign that separates the header's columns, outside quotes; None if there is none.

    `lines`: the header's, and of the first records as many as are known. Of several signs it is the one that splits
    most of these records into as many values as the header has names.
    """
    signs = [sign for sign in _SIGNS if sign in _QUOTED.sub("", lines[0])]
    if len(signs) < 2:
        return next(iter(signs), None)
    return max(signs, key=lambda sign: _fitting(lines, sign))


def _fitting(lines: Sequence[str], sign: str) -> int:
    """Returns how many of the first records have as many values as the header, split by a sign."""
    sizes = [len(record) for record in islice(_records(lines, sign), 1 + _SAMPLED)]
    return sizes[1:].count(sizes[0]) if sizes else 0


def _records(lines: Sequence[str], sign: str) -> Iterator[list[str]]:
    reader = csv.reader(lines, delimiter=sign)
    try:
        yield from filter(None, reader)
    except csv.Error:
        return
