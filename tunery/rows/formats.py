"""The interface of a file format: how it is recognised, and how its bytes become rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tunery.rows.errors import InvalidRows

if TYPE_CHECKING:
    from tunery.rows.shapes import FileShape


class SourceRow(NamedTuple):
    """One row of a file: its fields, or why it has none (the end of a sentence that names the row).

    `number`: the one by which every message and report names the row, from 1 and ascending: of a table the line on
    which it begins, else its place among the rows, which in JSON Lines is its line. `line`: the line on which it
    begins, where that is not its number. `shape`: of the file's rows. `text`: the JSON of a row that is not parsed yet
    (`jsonl.parse`), whose other members say nothing so far. `is_table`: whether it is a line of a table, in which a
    null stands for an empty cell.
    """

    number: int
    fields: dict[str, Any] | None
    fault: str | None = None
    line: int | None = None
    shape: "FileShape | None" = None
    text: str | None = None
    is_table: bool = False

    @property
    def name(self) -> str:
        """The row's name in messages: `line 3` of a table, else `example 3`, with its line where the two differ."""
        if self.is_table:
            return f"line {self.number}"
        beside = f" (line {self.line})" if self.line not in (None, self.number) else ""
        return f"example {self.number}{beside}"

    def load(self) -> dict[str, Any]:
        """Returns the row's fields. Raises ValueError, with a readable reason, if it has none."""
        if self.fields is None:
            raise ValueError(self.fault)
        return self.fields


class Parser(Protocol):
    """Turns the bytes of one file, which come in chunks of any size, into rows. The first chunk always has the file's
    first `readers.HEAD_BYTES`, unless it is shorter.

    A fault of one row is in its SourceRow, and reading goes on; InvalidRows ends it. Each iterator is read to its end
    before the next call. Memory must not grow with the file: a format that is read from its end, as Parquet is, writes
    the chunks to a temporary file and gives all rows in `close`.
    """

    def feed(self, chunk: bytes) -> Iterator[SourceRow]:
        """Yields the rows that `chunk` completes. Raises InvalidRows."""

    def close(self) -> Iterator[SourceRow]:
        """Yields the remaining rows at the file's end. Raises InvalidRows, also for a file without rows."""


@dataclass(frozen=True)
class Format:
    """A format: `recognises` gets the file's first bytes, at most `readers.HEAD_BYTES`; `open` returns a new parser.

    `error`: the class of errors about a row of such a file. `by_lines`: whether the numbers of rows are their lines.
    """

    name: str
    recognises: Callable[[bytes], bool]
    open: Callable[[], Parser]
    error: type[InvalidRows] = InvalidRows
    by_lines: bool = False

    def refuse(self, number: int, reason: str) -> InvalidRows:
        """Returns the error about a row, or about the place where no row could be read."""
        return self.error(param="file", format=self.name, line=number, reason=reason)
