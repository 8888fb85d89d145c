"""The one reader of files with rows: upload, validation and trainer read through it, so a file has one verdict.

A new format is an entry of FORMATS.
"""

from collections.abc import Callable, Iterable, Iterator

from tunery.rows import compression
from tunery.rows.compression import Expander
from tunery.rows.formats import Format, Parser, SourceRow
from tunery.rows.json_array import JSON_ARRAY
from tunery.rows.jsonl import JSONL
from tunery.rows.parquet import PARQUET
from tunery.rows.tables import CSV, TSV

HEAD_BYTES = 64 * 2**10
"""First bytes by which a format is recognised. Always as many, unless the file is shorter: what a file is must not
depend on where its chunks end."""

_MAGIC_BYTES = 4

FORMATS: dict[str, Format] = {format.name: format for format in (JSONL, JSON_ARRAY, PARQUET, TSV, CSV)}
"""By name, in the order in which they are asked. What none recognises is read as JSON Lines, which names what it is."""


def recognise(head: bytes) -> Format:
    """Returns the format of a file that begins with `head`."""
    return next((format for format in FORMATS.values() if format.recognises(head)), JSONL)


class Reader:
    """Reads one file while its bytes come in. Each iterator is read to its end before the next call."""

    def __init__(self) -> None:
        self.format: Format = JSONL
        self._magic: bytes | None = b""
        self._expander: Expander | None = None
        self._head = bytearray()
        self._parser: Parser | None = None

    @property
    def compression(self) -> str | None:
        """How the file is compressed: gzip, zstd or not at all."""
        return self._expander.kind if self._expander is not None else None

    @property
    def kind(self) -> str | None:
        """The format's name, with the compression; None before enough of the file has come."""
        if self._parser is None:
            return None
        return f"{self.format.name}, compressed with {self.compression}" if self.compression else self.format.name

    def feed(self, chunk: bytes) -> Iterator[SourceRow]:
        """The rows that `chunk` completes. Raises InvalidRows."""
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
        """The rows that are left at the file's end. Raises InvalidRows, also for a file without any row."""
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
        yield from self._parser.feed(head)


def read(chunks: Iterable[bytes]) -> Iterator[SourceRow]:
    """A file's rows. Raises InvalidRows where the bytes are no rows."""
    reader = Reader()
    for chunk in chunks:
        yield from reader.feed(chunk)
    yield from reader.close()


def identify(chunks: Iterable[bytes]) -> str:
    """The name of a file's format, with its compression. Reads no further than it has to. Raises InvalidRows."""
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
    """Checks a file while it streams by, in memory that does not grow with it: every row must have fields."""

    def __init__(self, seen: Callable[[SourceRow], object] | None = None) -> None:
        """`seen` is called with each good row."""
        self._reader, self._seen = Reader(), seen
        self.rows = 0
        """Rows seen so far."""

    def feed(self, chunk: bytes) -> None:
        """The next bytes, however many. Raises InvalidRows at the first row that is wrong."""
        self._check(self._reader.feed(chunk))

    def close(self) -> None:
        """The file's end. Raises InvalidRows for a wrong last row or a file without any."""
        self._check(self._reader.close())

    def _check(self, rows: Iterator[SourceRow]) -> None:
        for row in rows:
            if row.fault is not None:
                raise self._reader.format.refuse(row.number, row.fault + _place(row))
            self.rows += 1
            if self._seen is not None:
                self._seen(row)


def _place(row: SourceRow) -> str:
    """Returns the line on which a row with a fault begins, where its number is another."""
    return f" It begins on line {row.line} of the file." if row.line not in (None, row.number) else ""
