"""Reads CSV and TSV: the first line names the columns, each record is a row."""

import csv
import re
from collections.abc import Iterator
from functools import partial

from tunery.rows import containers, separators
from tunery.rows.errors import InvalidRows, InvalidTable
from tunery.rows.formats import Format, SourceRow
from tunery.rows.jsonl import ENDED_BY_CR, MAX_LINE_BYTES

MOST_COLUMNS = 1000
MOST_LINES = 20_000
"""Maximum lines of one record. It is parsed again each time its length has doubled."""
_BOM = "\ufeff"
_BARE_CR = "new-line character"
"""What csv says of a line with a CR that is not before its LF."""
_SEPARATOR_LINE = re.compile(r'"?sep=[,;\t]"?')
"""What spreadsheets may write above the header."""

csv.field_size_limit(MAX_LINE_BYTES)


class _More(Exception):
    """The record continues in lines that have not arrived yet."""


class TableParser:
    """Reads records as they arrive; a quoted one may span several lines. An empty value is null.

    Lines end with LF; CR before it is not part of a value. As in concatenated files, byte order marks may begin any
    line, and the header may be repeated. Where a blank follows each separator of the header, as in `a, b`, those of the
    records are not part of a value either.
    """

    def __init__(self, name: str) -> None:
        """`name`: the format's, for errors."""
        self._name = name
        self._separator, self._is_spaced = ",", False
        self._columns: list[str] | None = None
        self._rest = bytearray()
        self._lines: list[str] = []
        self._waiting = 0
        """Characters of `_lines`."""
        self._line = 1
        self._has_rows = False
        self._next_try = 0
        self._is_head = True
        """Whether `_lines` are those of the first chunk, whose size does not depend on how the file arrives."""
        self._is_broken = False
        """Whether the next line is not UTF-8."""

    def feed(self, chunk: bytes) -> Iterator[SourceRow]:
        """Yields the rows that `chunk` completes. Raises InvalidRows."""
        whole, found, rest = chunk.rpartition(b"\n")
        self._rest += whole + found
        if found:
            self._cut()
            self._rest = bytearray()
            if (
                self._is_broken or self._waiting >= self._next_try or len(self._lines) > MOST_LINES
            ):  # else a long record would be parsed again with every chunk
                yield from self._records(ended=False)
            self._refuse_broken()
        self._rest += rest
        if len(self._rest) + self._waiting > MAX_LINE_BYTES:
            yield from self._records(ended=False)
        self._refuse_long()
        self._is_head = False

    def close(self) -> Iterator[SourceRow]:
        """Yields the remaining rows. Raises InvalidRows, also for a table without rows."""
        if self._rest:
            self._cut()
        yield from self._records(ended=not self._is_broken)
        self._refuse_broken()
        if self._columns is None:
            raise self._refuse("the file is empty. Write a header, and one record per row.")
        if not self._has_rows:
            raise self._refuse("the file has a header but no rows.")

    def _cut(self) -> None:
        """Splits off the complete lines that are UTF-8, without CR, LF and byte order marks at their ends."""
        try:
            text = self._rest.decode()
        except UnicodeDecodeError as error:
            self._is_broken = True
            text = self._rest[: self._rest.rfind(b"\n", 0, error.start) + 1].decode()
            if not text:
                return
        lines = text.removesuffix("\n").split("\n")
        self._lines += [line.rstrip("\r").lstrip(_BOM) + "\n" for line in lines]
        self._waiting += len(text) + 1

    def _refuse_broken(self) -> None:
        """Raises InvalidRows after the rows before a line that is not UTF-8."""
        if self._is_broken:
            raise self._refuse("is not UTF-8. Save the file as UTF-8.", self._line + len(self._lines))

    def _records(self, *, ended: bool) -> Iterator[SourceRow]:
        if self._columns is None:
            self._begin()
        lines, done = self._lines, 0
        reader = csv.reader(
            _until_end(lines, ended=ended),
            delimiter=self._separator,
            skipinitialspace=self._is_spaced,
            strict=True,
        )
        while done < len(lines):
            try:
                record: list[str] | csv.Error = next(reader)
            except _More:
                break
            except csv.Error as error:
                record = error
                if ended and "end of data" in str(error):
                    raise self._refuse("a quoted value has no end.") from None
            start, self._line = self._line, self._line + reader.line_num - done
            done = reader.line_num
            yield from self._take(record, start)
        self._lines = lines[done:]
        self._waiting = sum(map(len, self._lines))
        self._next_try = 2 * self._waiting

    def _begin(self) -> None:
        """Skips what is above the header, and finds how it separates the columns."""
        above = next((place for place, line in enumerate(self._lines) if not _is_above(line)), len(self._lines))
        self._lines, self._line = self._lines[above:], self._line + above
        if self._lines:
            header = self._lines[0]
            self._separator = separators.find(self._lines if self._is_head else [header]) or ","
            if self._separator == separators.PIPE:
                raise self._refuse(f"the file {containers.SEPARATED_BY_PIPES}")
            self._is_spaced = all(name.startswith(" ") for name in header.split(self._separator)[1:])

    def _take(self, record: list[str] | csv.Error, line: int) -> Iterator[SourceRow]:
        if self._columns is None:
            self._columns = self._read_header(record, line)
        elif record and (isinstance(record, csv.Error) or record != self._columns):
            self._has_rows = True
            yield _row(line, self._columns, record)

    def _read_header(self, record: list[str] | csv.Error, line: int) -> list[str]:
        if isinstance(record, csv.Error) and _BARE_CR in str(record):
            raise self._refuse(f"the header {ENDED_BY_CR}", line)
        if isinstance(record, csv.Error) or not record:
            raise self._refuse("the header cannot be read. Name the columns, without a line break in a name.", line)
        if len(record) > MOST_COLUMNS:
            raise self._refuse(
                f"the table has {len(record)} columns, more than {MOST_COLUMNS}. Keep only the columns that are used.",
                line,
            )
        twice = next((name for place, name in enumerate(record) if name and name in record[:place]), None)
        if twice is not None:
            raise self._refuse(f"two columns have the name '{twice[:40]}'. Rename one of them.", line)
        return record

    def _refuse_long(self) -> None:
        if len(self._rest) + self._waiting > MAX_LINE_BYTES or len(self._lines) > MOST_LINES:
            if b"\r" in self._rest[:-1] and self._columns is None:
                raise self._refuse(f"the header {ENDED_BY_CR}")
            limit = f"{MAX_LINE_BYTES // 2**20} MiB or {MOST_LINES} lines"
            raise self._refuse(
                f"is longer than {limit}, which is the limit for one row. A closing quote may be missing."
            )

    def _refuse(self, reason: str, line: int | None = None) -> InvalidRows:
        return InvalidTable(param="file", format=self._name, line=line or self._line, reason=reason)


def _is_above(line: str) -> bool:
    return not line.strip() or _SEPARATOR_LINE.fullmatch(line.strip("\n")) is not None


def _until_end(lines: list[str], *, ended: bool) -> Iterator[str]:
    yield from lines
    if not ended:
        raise _More


_REASONS = {
    _BARE_CR: "there is a bare CR between its values. End each line with LF or CRLF.",
    "expected after": "there is text after a value's closing quote. Double a quote inside a quoted value.",
}


def _row(line: int, columns: list[str], record: list[str] | csv.Error) -> SourceRow:
    refused = partial(SourceRow, line, None, is_table=True)
    if isinstance(record, csv.Error):
        known = (reason for words, reason in _REASONS.items() if words in str(record))
        return refused(next(known, f"cannot be read: {record}."))
    if len(record) != len(columns):
        fault = f"has {len(record)} values, but the header has {len(columns)} columns."
        return refused(f"{fault} Quote values that contain separators or line breaks.")
    if any("\0" in value for value in record):
        return refused("a value has the character NUL, which cannot be stored. Remove it.")
    pairs = zip(columns, record, strict=True)
    return SourceRow(line, {name: value or None for name, value in pairs if name}, is_table=True)


def _begins(head: bytes, separators: str) -> bool:
    first_line = containers.unmark(head).lstrip(b"\r\n").split(b"\n", 1)[0]
    sign = containers.separator(first_line)
    return sign is not None and sign in separators


def _format(name: str, separators: str) -> Format:
    return Format(
        name=name,
        recognises=lambda head: _begins(head, separators),
        open=partial(TableParser, name),
        error=InvalidTable,
        by_lines=True,
    )


TSV = _format("TSV", "\t")
CSV = _format("CSV", ",;")
