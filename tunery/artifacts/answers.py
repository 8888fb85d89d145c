"""Pages of `answers.jsonl`, which has the answers to every row of a scorecard.

A row's id contains its offset in the file, so a page is read from there line by line, whatever the file's size.
There is no table, because the file is in the artifact already, and a copy would have to be stored and removed with it.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tunery.artifacts.model import Artifact
from tunery.errors import NotFound
from tunery.storage import Storage

FILE = "answers.jsonl"
_ID = re.compile(r"answer_([1-9]\d{0,9})_(\d{1,15})")


@dataclass(frozen=True)
class AnsweredRow:
    """One test row: its number in the file from 1, its byte offset, and its line's JSON."""

    number: int
    start: int
    answered: dict[str, Any]

    @property
    def id(self) -> str:
        """The id after which the next page begins."""
        return f"answer_{self.number}_{self.start}"


def read_page(
    storage: Storage, file: Artifact, *, shown: Callable[[AnsweredRow], bool], after: str | None, limit: int
) -> tuple[list[AnsweredRow], bool]:
    """Returns the next `limit` rows that are shown, and whether more follow. Raises NotFound, ObjectMissing."""
    rows = _rows(storage, file) if after is None else _rows_after(storage, file, after)
    found: list[AnsweredRow] = []
    for row in rows:
        if shown(row):
            if len(found) == limit:
                return found, True
            found.append(row)
    return found, False


def _rows(storage: Storage, file: Artifact, number: int = 1, start: int = 0) -> Iterator[AnsweredRow]:
    for line in _lines(storage.read(file.key, start)):
        yield AnsweredRow(number, start, json.loads(line))
        number, start = number + 1, start + len(line)


def _rows_after(storage: Storage, file: Artifact, after: str) -> Iterator[AnsweredRow]:
    """Yields the rows after the one with that id. Raises NotFound if no row begins there."""
    place = _ID.fullmatch(after)
    missing = NotFound(kind="object to go on after", id=after, param="after")
    if place is None:
        raise missing
    rows = _rows(storage, file, int(place[1]), int(place[2]))
    try:
        next(rows)
    except (StopIteration, ValueError):
        raise missing from None
    return rows


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields whole lines with their ends."""
    parts: list[bytes] = []
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield b"".join([*parts, end, b"\n"])
            parts = []
        parts.append(rest)
    if last := b"".join(parts):
        yield last
