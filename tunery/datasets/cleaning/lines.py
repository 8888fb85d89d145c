"""Reads the lines of a file for cleaning: JSON Lines byte for byte, rows of other formats as JSON objects."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunery.datasets.report.rows import chunks
from tunery.rows import compression, readers
from tunery.rows.compression import Expander
from tunery.rows.formats import SourceRow
from tunery.rows.jsonl import JSONL
from tunery.rows.shapes import FileShape


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields each row's number and line, without the line end. Raises InvalidRows."""
    if readers.identify(chunks(path)).startswith(JSONL.name):
        yield from _split(path)
    else:
        yield from ((row.number, dump(row.fields)) for row in readers.read(chunks(path)) if row.fields is not None)


def read_rows(path: Path, numbers: Collection[int], columns: Mapping[str, str]) -> Iterator[SourceRow]:
    """Yields the rows with these numbers, each with a shape of its own. Raises InvalidRows."""
    chosen = (row for row in readers.read(chunks(path)) if row.number in numbers)
    return (row._replace(shape=FileShape(columns)) for row in chosen)


def dump(fields: dict[str, Any]) -> bytes:
    """Returns the line of a row. Values without a JSON type, such as dates in tables, are written as text."""
    return json.dumps(fields, ensure_ascii=False, default=str).encode()


def _split(path: Path) -> Iterator[tuple[int, bytes]]:
    number, rest = 0, b""
    for piece in _expanded(path):
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            number += 1
            if line.strip():  # blank lines follow the last row
                yield number, line
    if rest.strip():
        yield number + 1, rest


def _expanded(path: Path) -> Iterator[bytes]:
    expander: Expander | None = None
    for number, chunk in enumerate(chunks(path)):
        kind = compression.recognise(chunk) if number == 0 else None
        expander = Expander(kind) if kind is not None else expander
        yield from (chunk,) if expander is None else expander.feed(chunk)
