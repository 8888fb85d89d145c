"""The one reader of files with rows: upload, validation and trainer read through it, so a file has one verdict.

A new format is an entry of FORMATS.
"""

from collections.abc import Iterable, Iterator

from tunery.rows.formats import Format, Parser, SourceRow
from tunery.rows.jsonl import JSONL

HEAD_BYTES = 64 * 2**10
"""First bytes by which a format is recognised. Always as many, unless the file is shorter: what a file is must not
depend on where its chunks end."""

FORMATS: dict[str, Format] = {JSONL.name: JSONL}
"""By name, in the order in which they are asked. What none recognises is read as JSON Lines, which names what it is."""


def recognise(head: bytes) -> Format:
    """The format of a file that begins with `head`."""
    return next((format for format in FORMATS.values() if format.recognises(head)), JSONL)


class Reader:
    """Reads one file while its bytes come in. Each iterator is read to its end before the next call."""

    def __init__(self) -> None:
        self.format: Format = JSONL
        self._head = bytearray()
        self._parser: Parser | None = None

    def feed(self, chunk: bytes) -> Iterator[SourceRow]:
        """The rows that `chunk` completes. Raises InvalidRows."""
        if self._parser is not None:
            yield from self._parser.feed(chunk)
            return
        self._head += chunk
        if len(self._head) >= HEAD_BYTES:
            yield from self._begin()

    def close(self) -> Iterator[SourceRow]:
        """The rows that are left at the file's end. Raises InvalidRows, also for a file without any row."""
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


class Checker:
    """Checks a file while it streams by, in memory that does not grow with it: every row must have fields."""

    def __init__(self) -> None:
        self._reader = Reader()
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
                raise self._reader.format.refuse(row.number, row.fault)
            self.rows += 1
