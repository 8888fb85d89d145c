"""Reads the lines of a file for cleaning: JSON Lines byte for byte, rows of other formats as JSON objects."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tunery.rows import jsonl, readers
from tunery.rows.formats import Format, SourceRow
from tunery.rows.shapes import FileShape


class Line(NamedTuple):
    """A row as a line of JSON Lines, without the line end; `fault`: why a row of another format has none."""

    number: int
    text: bytes
    fault: str | None = None


def read_lines(path: Path, columns: Mapping[str, str]) -> Iterator[Line]:
    """Yields the line of each row; `columns`: see `FileShape`. Raises InvalidRows."""
    reader, shape = readers.Reader(), FileShape(columns)
    for chunk in readers.chunks_of(path):
        yield from (_line(row, reader.format, shape) for row in reader.feed(chunk))
    yield from (_line(row, reader.format, shape) for row in reader.close())


def _line(row: SourceRow, format: Format, shape: FileShape) -> Line:
    if row.text is not None and format is jsonl.JSONL:
        return Line(row.number, row.text.encode())
    row = shape.fill(jsonl.parse(row))
    return Line(row.number, b"" if row.fields is None else dump(row.fields), row.fault)


def read_rows(path: Path, numbers: Collection[int], columns: Mapping[str, str]) -> Iterator[SourceRow]:
    """Yields the rows with these numbers, each with a shape of its own. Raises InvalidRows."""
    shape = FileShape(columns)
    filled = map(shape.fill, readers.read(readers.chunks_of(path)))
    chosen = (row for row in filled if row.number in numbers)
    return (row._replace(shape=FileShape(columns)) for row in chosen)


def dump(fields: dict[str, Any]) -> bytes:
    """Returns the line of a row. Values without a JSON type, such as dates in tables, are written as text."""
    return json.dumps(fields, ensure_ascii=False, default=str).encode()
