"""Reads JSON Lines in constant memory, from chunks of any size."""

from collections.abc import Iterator

from tunery.rows import containers, strict_json
from tunery.rows.errors import InvalidJSONL, InvalidRows
from tunery.rows.formats import Format, SourceRow

MAX_LINE_BYTES = 4 * 2**20
_BOM = b"\xef\xbb\xbf"


class JsonlParser:
    """Splits chunks into lines, each a JSON object; refuses text that is not UTF-8, too long a line, and a blank line
    between rows.

    A line ends with LF. CR before it, or between tokens, is white space as in JSON. A byte order mark may begin any
    line, as in concatenated files. Blank lines may only follow the last row, so that a row's number is its line's.
    """

    def __init__(self) -> None:
        self._number = 0
        self._rest = bytearray()
        self._blank: int | None = None
        self._begun = False

    def feed(self, chunk: bytes) -> Iterator[SourceRow]:
        """Yields the rows of the lines that `chunk` completes. Raises InvalidJSONL."""
        pieces = chunk.split(b"\n")
        self._rest += pieces[0]
        if len(pieces) > 1:
            pieces[0], self._rest = bytes(self._rest), bytearray(pieces.pop())
            yield from filter(None, map(self._take, pieces))
        self._check_length(self._rest)

    def close(self) -> Iterator[SourceRow]:
        """Yields the last line's row, if no newline ended it. Raises InvalidJSONL, also for a file without rows."""
        if self._rest:
            yield from filter(None, [self._take(bytes(self._rest))])
        if not self._begun:
            raise _fault(1, "the file is empty. Write one JSON object per line.")

    def _check_length(self, line: bytes | bytearray) -> None:
        if len(line) > MAX_LINE_BYTES:
            self._refuse_container(bytes(line[:MAX_LINE_BYTES]), self._number + 1)
            limit = f"{MAX_LINE_BYTES // 2**20} MiB"
            raise _fault(self._number + 1, f"is longer than {limit}, which is the limit for one line.")

    def _take(self, line: bytes) -> SourceRow | None:
        """Returns a line's row, which is not parsed yet; None if the line is blank."""
        self._check_length(line)
        self._number += 1
        self._refuse_container(line, self._number)
        try:
            text = line.removeprefix(_BOM).decode()
        except UnicodeDecodeError as error:
            raise _fault(self._number, f"is not UTF-8 (byte {error.start + 1}). Save the file as UTF-8.") from None
        if not text or text.isspace():
            self._blank = self._blank or self._number
            return None
        if self._blank:
            raise _fault(self._blank, "is blank. Remove it: blank lines are allowed only at the end.")
        self._begun = True
        return SourceRow(self._number, None, text=text)

    def _refuse_container(self, line: bytes, number: int) -> None:
        if not self._begun and (what := containers.recognise(line.removeprefix(_BOM))):
            raise _fault(number, f"the file {what}")


JSONL = Format(
    name="JSONL",
    recognises=lambda head: head.removeprefix(_BOM).lstrip().startswith(b"{"),
    open=JsonlParser,
    error=InvalidJSONL,
)


def _fault(line: int, reason: str) -> InvalidRows:
    return JSONL.refuse(line, reason)


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
    if error.problem == "Extra data":
        return f"there is text after the JSON object {column}. Write one object per line, followed only by LF."
    if error.problem.startswith("Unterminated string"):
        return f"a string does not end on this line {column}. Write a line break inside a string as \\n."
    if error.problem.startswith("Invalid control character"):
        return f"a string contains a control character {column}. Escape it with a backslash: \\t, \\r, \\u001f."
    if error.position >= len(line.rstrip()):
        return f"the object does not end on this line {column}. Write each object on a single line."
    return f"is not JSON: {error}"
