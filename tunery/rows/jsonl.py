"""Reads JSON Lines in constant memory, from chunks of any size."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain

from tunery.rows import containers, strict_json
from tunery.rows.errors import InvalidJSONL, InvalidRows
from tunery.rows.formats import Format, SourceRow

ENDED_BY_CR = "is followed by a CR without LF, the line end of old Macs. End each line with LF or CRLF."
MAX_LINE_BYTES = 4 * 2**20
_BOM = "\ufeff"
_JOINED = re.compile(rf"\}}\s*{_BOM}")
_BLANKS = re.compile(rf"[\s{_BOM}]*")
# This decoder only finds a value's end, so it converts no numbers: `parse` checks them.
ENDS = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)


class JsonlParser:
    """Splits chunks into lines, each a JSON object; refuses text that is not UTF-8, too long a line, and a blank line
    between rows.

    A line ends with LF. CR before it, or between tokens, is white space as in JSON. Byte order marks may begin any
    line, as in concatenated files, or stand between two objects of a line, where the first file had no LF at its end.
    Blank lines may only follow the last row, so that a row's number is its line's, but for such joined lines.
    """

    def __init__(self) -> None:
        self._number = 0
        self._joined = 0
        """Rows that do not begin their line."""
        self._rest = bytearray()
        self._blank: int | None = None
        self._begun = False

    def feed(self, chunk: bytes) -> Iterator[SourceRow]:
        """Yields the rows of the lines that `chunk` completes. Raises InvalidJSONL."""
        pieces = chunk.split(b"\n")
        self._rest += pieces[0]
        if len(pieces) > 1:
            pieces[0], self._rest = bytes(self._rest), bytearray(pieces.pop())
            yield from chain.from_iterable(map(self._take, pieces))
        self._check_length(self._rest)

    def close(self) -> Iterator[SourceRow]:
        """Yields the last line's row, if no newline ended it. Raises InvalidJSONL, also for a file without rows."""
        if self._rest:
            yield from self._take(bytes(self._rest))
        if not self._begun:
            raise _fault(1, "the file is empty. Write one JSON object per line.")

    def _check_length(self, line: bytes | bytearray) -> None:
        if len(line) > MAX_LINE_BYTES:
            self._refuse_container(bytes(line[:MAX_LINE_BYTES]), self._number + 1)
            limit = f"{MAX_LINE_BYTES // 2**20} MiB"
            raise _fault(self._number + 1, f"is longer than {limit}, which is the limit for one line.")

    def _take(self, line: bytes) -> Sequence[SourceRow]:
        """Returns a line's rows, nearly always one, which are not parsed yet; none if the line is blank."""
        self._check_length(line)
        self._number += 1
        self._refuse_container(line, self._number)
        try:
            text = line.decode().lstrip(_BOM)
        except UnicodeDecodeError as error:
            raise _fault(self._number, f"is not UTF-8 (byte {error.start + 1}). Save the file as UTF-8.") from None
        if not text or text.isspace():
            self._blank = self._blank or self._number
            return ()
        if self._blank:
            raise _fault(self._blank, "is blank. Remove it: blank lines are allowed only at the end.")
        self._begun = True
        texts: Sequence[str] = _split(text) if _BOM in text and _JOINED.search(text) else (text,)
        first = self._number + self._joined
        if first == self._number and len(texts) == 1:
            return (SourceRow(first, None, text=texts[0]),)
        self._joined += len(texts) - 1
        return [SourceRow(first + place, None, line=self._number, text=text) for place, text in enumerate(texts)]

    def _refuse_container(self, line: bytes, number: int) -> None:
        if not self._begun and (what := containers.recognise(containers.unmark(line))):
            raise _fault(number, f"the file {what}")


JSONL = Format(
    name="JSONL",
    recognises=lambda head: containers.unmark(head).lstrip().startswith(b"{"),
    open=JsonlParser,
    error=InvalidJSONL,
    by_lines=True,
)


def _fault(line: int, reason: str) -> InvalidRows:
    return JSONL.refuse(line, reason)


def _split(line: str) -> list[str]:
    """Returns the objects of a line that byte order marks separate."""
    found, place = [], _after_blanks(line, 0)
    while place < len(line):
        end = _find_end(line, place)
        found.append(line[place:end])
        place = _after_blanks(line, end)
    return found


def _find_end(line: str, place: int) -> int:
    """Returns where the object ends if a byte order mark follows; else the line's end."""
    try:
        end = ENDS.raw_decode(line, place)[1]
    except (json.JSONDecodeError, RecursionError):
        return len(line)
    return end if _BOM in line[end : _after_blanks(line, end)] else len(line)


def _after_blanks(line: str, place: int) -> int:
    found = _BLANKS.match(line, place)
    assert found is not None, "no blanks match too"
    return found.end()


def parse(row: SourceRow) -> SourceRow:
    """Returns a row with its fields, or with the reason why it has none, in place of its text."""
    if row.text is None:
        return row
    fields, fault = None, None
    try:
        fields = strict_json.load_object(row.text)
    except strict_json.NotJSON as error:
        fault = _cause(row.text, error)
    except ValueError as error:
        fault = str(error)
    return SourceRow(row.number, fields, fault, row.line, row.shape)


def _cause(line: str, error: strict_json.NotJSON) -> str:
    """Returns why a line is not JSON, and what to do about it where the cause is a usual one."""
    column = f"(column {error.position + 1})"
    if error.is_python:
        return f"is a Python literal, not JSON {column}. Write each row with json.dumps(row)."
    if error.problem == "Extra data" and "\r" in line[len(line[: error.position].rstrip()) : error.position]:
        return f"the object {ENDED_BY_CR}"
    if error.problem == "Extra data":
        return f"there is text after the JSON object {column}. Write one object per line, followed only by LF."
    if error.problem.startswith("Unterminated string"):
        return f"a string does not end on this line {column}. Write a line break inside a string as \\n."
    if error.problem.startswith("Invalid control character"):
        return f"a string contains a control character {column}. Escape it with a backslash: \\t, \\r, \\u001f."
    if error.position >= len(line.rstrip()):
        return f"the object does not end on this line {column}. Write each object on a single line."
    return f"is not JSON: {error}"
