"""JSONL in constant memory: bytes come in chunks of any size, lines go out."""

from collections.abc import Iterable, Iterator

from tunery.errors import InvalidJSONL
from tunery.rows import strict_json

MAX_LINE_BYTES = 4 * 2**20
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class _Lines:
    """Cuts chunks into lines: LF or CRLF, UTF-8 with or without a byte order mark."""

    def __init__(self) -> None:
        self.number = 0
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The lines that `chunk` completes; `number` is that of the line just given. Raises InvalidJSONL."""
        pieces = chunk.split(b"\n")
        for piece in pieces[:-1]:
            self._keep(piece)
            yield self._take()
        self._keep(pieces[-1])

    def close(self) -> Iterator[str]:
        """The last line, if no newline ended it."""
        if self._rest:
            yield self._take()

    def _keep(self, piece: bytes) -> None:
        self._rest += piece
        if len(self._rest) > MAX_LINE_BYTES:
            limit = f"{MAX_LINE_BYTES // 2**20} MiB"
            raise self.fault(self.number + 1, f"is longer than {limit}, which is the limit for one line.")

    def _take(self) -> str:
        self.number += 1
        line, self._rest = bytes(self._rest), bytearray()
        if self.number == 1:
            if line.startswith(_UTF16_BOMS):
                raise self.fault(1, "the file is in UTF-16. Save it as UTF-8.")
            line = line.removeprefix(_BOM)
        try:
            return line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise self.fault(self.number, f"is not UTF-8 (byte {error.start + 1}). Save the file as UTF-8.") from None

    @staticmethod
    def fault(line: int, reason: str) -> InvalidJSONL:
        return InvalidJSONL(param="file", line=line, reason=reason)


class JsonlChecker:
    """Checks a file while it streams by, in memory of one line.

    Every line must be a JSON object (`strict_json`); blank lines may stand at the end only, so that a row's number is
    its line's number everywhere.
    """

    def __init__(self) -> None:
        self._lines = _Lines()
        self._blank: int | None = None
        self.rows = 0
        """Objects seen so far."""

    def feed(self, chunk: bytes) -> None:
        """The next bytes, however many. Raises InvalidJSONL at the first line that is wrong."""
        for line in self._lines.feed(chunk):
            self._check(line)

    def close(self) -> None:
        """The file's end. Raises InvalidJSONL for a wrong last line or a file without any object."""
        for line in self._lines.close():
            self._check(line)
        if not self.rows:
            raise self._lines.fault(1, "the file is empty. Write one JSON object a line.")

    def _check(self, line: str) -> None:
        if not line.strip():
            self._blank = self._blank or self._lines.number
            return
        if self._blank:
            raise self._lines.fault(self._blank, "is blank. Remove it: blank lines may stand at the end only.")
        try:
            strict_json.load_object(line)
        except ValueError as error:
            raise self._lines.fault(self._lines.number, str(error)) from None
        self.rows += 1


def iter_lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1. Raises InvalidJSONL for bytes that are not UTF-8."""
    lines = _Lines()
    for chunk in chunks:
        for line in lines.feed(chunk):
            if line.strip():
                yield lines.number, line
    for line in lines.close():
        if line.strip():
            yield lines.number, line
