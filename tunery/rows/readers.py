"""Reads files with rows. Upload, validation and trainer all use it, so they agree about a file.

A new format is an entry of FORMATS.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tunery.rows import compression
from tunery.rows.compression import Expander
from tunery.rows.formats import Format, Parser, SourceRow
from tunery.rows.json_array import JSON_ARRAY
from tunery.rows.jsonl import JSONL, parse
from tunery.rows.parquet import PARQUET
from tunery.rows.tables import CSV, TSV

HEAD_BYTES = 64 * 2**10
"""First bytes by which a format is recognised. Always this many, unless the file is shorter, so that the result does
not depend on the size of chunks."""

_MAGIC_BYTES = 4

FORMATS: dict[str, Format] = {format.name: format for format in (JSONL, JSON_ARRAY, PARQUET, TSV, CSV)}
"""By name, in the order in which they are tried. A file that none recognises is read as JSON Lines, whose error says
what it is."""


def recognise(head: bytes) -> Format:
    """Returns the format of a file that begins with `head`."""
    return next((format for format in FORMATS.values() if format.recognises(head)), JSONL)


def counts_lines(kind: str) -> bool:
    """Returns whether the numbers of a file's rows are its lines. `kind`: as `Reader.kind` gives it."""
    format = FORMATS.get(kind.partition(",")[0])
    return format is not None and format.by_lines


class Reader:
    """Reads one file as its bytes arrive. Each iterator must be exhausted before the next call."""

    def __init__(self) -> None:
        self.format: Format = JSONL
        self._magic: bytes | None = b""
        self._expander: Expander | None = None
        self._head = bytearray()
        self._parser: Parser | None = None

    @property
    def compression(self) -> str | None:
        """How the file is compressed: gzip, zstd, or None."""
        return self._expander.kind if self._expander is not None else None

    @property
    def kind(self) -> str | None:
        """The format's name, with the compression; None until enough of the file has arrived."""
        if self._parser is None:
            return None
        return f"{self.format.name}, compressed with {self.compression}" if self.compression else self.format.name

    def feed(self, chunk: bytes) -> Iterator[SourceRow]:
        """Yields the rows that `chunk` completes. Raises InvalidRows."""
        if self._magic is not None:
            self._magic = chunk = self._magic + chunk
            if len(chunk) < _MAGIC_BYTES:
                return
        yield from self._expand(chunk)

    def _expand(self, chunk: bytes) -> Iterator[SourceRow]:
        if self._magic is not None:
            kind, self._magic = compression.recognise(chunk), None
            self._expander = Expander(kind) if kind is not None else None
        for piece in (chunk,) if self._expander is None else self._expander.feed(chunk):
            yield from self._parse(piece)

    def _parse(self, chunk: bytes) -> Iterator[SourceRow]:
        if self._parser is not None:
            yield from self._parser.feed(chunk)
            return
        self._head += chunk
        if len(self._head) >= HEAD_BYTES:
            yield from self._begin()

    def close(self) -> Iterator[SourceRow]:
        """Yields the remaining rows at the file's end. Raises InvalidRows, also for a file without rows."""
        if self._magic is not None:
            yield from self._expand(self._magic)
        if self._expander is not None:
            self._expander.close()
        if self._parser is None:
            yield from self._begin()
        assert self._parser is not None, "a file begins once"
        yield from self._parser.close()

    def _begin(self) -> Iterator[SourceRow]:
        self.format = recognise(bytes(self._head[:HEAD_BYTES]))
        self._parser = self.format.open()
        head, self._head = bytes(self._head), bytearray()
        yield from self._parser.feed(head[:HEAD_BYTES])
        yield from self._parser.feed(head[HEAD_BYTES:])


def chunks_of(path: Path) -> Iterator[bytes]:
    """Yields a file's bytes, in chunks of 1 MiB."""
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            yield chunk


def read(chunks: Iterable[bytes]) -> Iterator[SourceRow]:
    """Yields a file's rows. Raises InvalidRows if the bytes are not rows."""
    return map(parse, split(chunks))


def split(chunks: Iterable[bytes]) -> Iterator[SourceRow]:
    """Yields a file's rows, those of JSON not parsed yet. Raises InvalidRows if the bytes are not rows."""
    reader = Reader()
    for chunk in chunks:
        yield from reader.feed(chunk)
    yield from reader.close()


def identify(chunks: Iterable[bytes]) -> str:
    """Returns the name of a file's format, with its compression, reading as little as possible. Raises InvalidRows."""
    reader = Reader()
    for chunk in chunks:
        for _ in reader.feed(chunk):
            break
        if reader.kind is not None:
            break
    else:
        list(reader.close())
    return reader.kind or reader.format.name


class Checker:
    """Checks a stream, in constant memory: every row must have fields."""

    def __init__(self, seen: Callable[[SourceRow], object] | None = None) -> None:
        """`seen` is called with each valid row."""
        self._reader, self._seen = Reader(), seen
        self.rows = 0
        """Rows seen so far."""

    def feed(self, chunk: bytes) -> None:
        """Reads the next bytes. Raises InvalidRows at the first invalid row."""
        self._check(self._reader.feed(chunk))

    def close(self) -> None:
        """Ends the file. Raises InvalidRows for an invalid last row or a file without rows."""
        self._check(self._reader.close())

    def _check(self, rows: Iterator[SourceRow]) -> None:
        for row in map(parse, rows):
            if row.fault is not None:
                raise self._reader.format.refuse(row.number, row.fault + _place(row))
            self.rows += 1
            if self._seen is not None:
                self._seen(row)


def _place(row: SourceRow) -> str:
    """Returns the line on which a row begins, in words, if it differs from the row's number."""
    return f" It begins on line {row.line} of the file." if row.line not in (None, row.number) else ""
