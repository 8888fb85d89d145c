"""Reads a JSON array of objects, on one line or many, with one object in memory at a time."""

import codecs
import json
import re
from collections.abc import Iterator

from tunery.rows import containers
from tunery.rows.errors import InvalidRows
from tunery.rows.formats import Format, SourceRow
from tunery.rows.jsonl import ENDS, MAX_LINE_BYTES

_BLANK = " \t\r\n\ufeff"
_BLANKS = re.compile(f"[{_BLANK}]*")
_LONGEST_WORD = len("-Infinity")


class JsonArrayParser:
    """Splits an array into its elements and reads each like a line of JSON Lines. As in concatenated files, several
    arrays may follow each other, and a byte order mark may precede any value."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._number, self._line, self._bytes = 0, 1, 0
        self._expects = "["
        self._next_try = 0
        self._broken_at: int | None = None
        """The first byte, from 1, that is not UTF-8."""

    def feed(self, chunk: bytes) -> Iterator[SourceRow]:
        """Yields the rows that `chunk` completes. Raises InvalidRows."""
        self._decode(chunk)
        if (
            self._broken_at or len(self._text) >= self._next_try
        ):  # else a long element would be parsed again with every small chunk
            yield from self._rows(ended=False)
        self._refuse_broken()

    def close(self) -> Iterator[SourceRow]:
        """Yields the remaining rows. Raises InvalidRows if the array is not closed."""
        self._decode(b"", final=True)
        yield from self._rows(ended=self._broken_at is None)
        self._refuse_broken()
        if self._expects != "[":
            raise self._refuse("the array has no end: a ']' is missing. Check that the file is complete.")
        if not self._number:
            raise self._refuse("the array is empty. Write one JSON object for each row.")

    def _decode(self, chunk: bytes, *, final: bool = False) -> None:
        try:
            self._text += self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            self._broken_at = self._bytes - len(self._decoder.getstate()[0]) + error.start + 1
            self._text += error.object[: error.start].decode()
        self._bytes += len(chunk)

    def _refuse_broken(self) -> None:
        """Raises InvalidRows after the rows before the first byte that is not UTF-8."""
        if self._broken_at is not None:
            self._line += self._text.count("\n", self._at)
            raise self._refuse(f"the file is not UTF-8 (byte {self._broken_at}). Save it as UTF-8.", row=1)

    def _rows(self, *, ended: bool) -> Iterator[SourceRow]:
        while self._skip_blank():
            sign = self._text[self._at]
            if self._expects == "value" or (self._expects == "first" and sign != "]"):
                end = self._find_end(ended=ended)
                if end is None:
                    break
                yield self._take(end)
                self._expects = ","
            else:
                self._step(sign)
        if len(self._text) - self._at > MAX_LINE_BYTES:
            limit = f"{MAX_LINE_BYTES // 2**20} MiB"
            reason = (
                f"is longer than {limit}, which is the limit for one row. A closing quote or bracket may be missing."
            )
            raise self._refuse(reason, row=1)
        self._next_try = 2 * (len(self._text) - self._at)
        self._text, self._at = self._text[self._at :], 0

    def _step(self, sign: str) -> None:
        """Handles one punctuation character between elements."""
        if sign == "[" and self._expects == "[":
            self._expects = "first"
        elif sign == "]" and self._expects in ("first", ","):
            self._expects = "["
        elif sign == "," and self._expects == ",":
            self._expects = "value"
        elif self._expects == "[":
            raise self._refuse("there is text after the array. Send a single array of objects.")
        else:
            raise self._refuse("expected ',' or ']' after the row.")
        self._at += 1

    def _skip_blank(self) -> bool:
        """Skips to the next non-blank character; returns whether there is one."""
        found = _BLANKS.match(self._text, self._at)
        assert found is not None, "no blanks match too"
        self._line += found[0].count("\n")
        self._at = found.end()
        return self._at < len(self._text)

    def _find_end(self, *, ended: bool) -> int | None:
        """Returns where the element ends; None if more of the file is needed. Raises InvalidRows."""
        try:
            end = ENDS.raw_decode(self._text, self._at)[1]
        except json.JSONDecodeError as error:
            if not ended and (len(self._text) - self._at <= MAX_LINE_BYTES or self._may_go_on(error)):
                return None
            self._line += self._text.count("\n", self._at, error.pos)
            raise self._refuse(f"is not JSON: {error.msg}", row=1) from None
        except RecursionError:
            raise self._refuse("objects and lists are nested too deeply.", row=1) from None
        # A number may continue in the next chunk.
        return end if ended or self._text[end:].strip(_BLANK) or self._text[end - 1] in '}]"' else None

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the element may be right so far."""
        return error.pos >= len(self._text) - _LONGEST_WORD or error.msg.startswith("Unterminated string")

    def _take(self, end: int) -> SourceRow:
        self._number += 1
        text = self._text[self._at : end]
        row = SourceRow(self._number, None, line=self._line, text=text)
        self._line += text.count("\n")
        self._at = end
        return row

    def _refuse(self, reason: str, row: int = 0) -> InvalidRows:
        return JSON_ARRAY.refuse(max(self._number + row, 1), f"{reason} (line {self._line} of the file)")


def _is_array(head: bytes) -> bool:
    head = containers.unmark(head).lstrip()
    return head.startswith(b"[") and not containers.is_list_of_messages(head)


JSON_ARRAY = Format(name="JSON array", recognises=_is_array, open=JsonArrayParser)
