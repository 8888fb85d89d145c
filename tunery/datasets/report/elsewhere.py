"""Finds rows that are in another file of the project too, by digests of rows."""

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.order import OtherFile
from tunery.datasets.report.rows import Row, whole

_ENTRY = struct.Struct("<8sI")
_ACTION = "Drop the rows from one of the two files if one of them is for testing."


@dataclass(frozen=True)
class Other:
    """Another file of the project. `lines`: the first line of each of its rows, by the row's digest. `has_lines`: see
    `OtherFile`."""

    id: str
    name: str
    lines: Mapping[bytes, int]
    has_lines: bool = True


def digest(row: Row) -> bytes:
    """Returns an 8-byte digest that is the same for rows with the same texts."""
    return hashlib.blake2b(whole(row).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def pack(rows: Iterable[Row]) -> bytes:
    """Returns the digests of rows with their lines, for storage."""
    return b"".join(_ENTRY.pack(digest(row), row.line) for row in rows if row.turns)


def unpack(data: bytes) -> dict[bytes, int]:
    """Returns the first line of each row, by its digest."""
    found: dict[bytes, int] = {}
    for key, line in _ENTRY.iter_unpack(data):
        found.setdefault(key, line)
    return found


def read(folder: Path, named: Iterable[OtherFile]) -> list[Other]:
    """Returns the other files, whose digests are in `folder` under their ids."""
    return [Other(other.id, other.name, unpack((folder / other.id).read_bytes()), other.has_lines) for other in named]


def find(case: Case) -> Iterator[Finding]:
    """Yields a finding for each other file that shares rows with this one."""
    if not case.others:
        return
    digests = [(row.line, digest(row)) for row in case.rows if row.turns]
    for other in case.others:
        shared = [(line, other.lines[key]) for line, key in digests if key in other.lines]
        if shared:
            lines = [line for line, _ in shared]
            there = sorted({line for _, line in shared}) if other.has_lines else []
            rows = "1 row is" if len(lines) == 1 else f"{len(lines):,} rows are"
            why = f"{rows} also in '{other.name}' ({other.id})."
            yield Finding("repeated_elsewhere", lines, len(lines) / len(digests), why, _ACTION, there)
