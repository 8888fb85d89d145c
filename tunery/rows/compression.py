"""Decompresses files piece by piece: gzip and zstd, in one stream or several concatenated ones."""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from tunery.rows.errors import InvalidRows

PIECE_BYTES = 2**20
"""The most bytes that are expanded at once, whatever the compression ratio."""
MOST_BYTES = 16 * 2**30
MOST_RATIO = 200
RATIO_FROM = 64 * 2**20
"""Expanded bytes below which the ratio is not checked: a small file may be repetitive."""
_MOST_WINDOW = 27
"""Exponent of the largest zstd window, 128 MiB, which is the zstd command's default limit."""


class Stream(Protocol):
    """A decompressor of one stream, with the standard library's interface."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """Gives zlib's decompressor the interface of zstd's."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _zstd() -> Any:
    from backports import zstd

    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _MOST_WINDOW})


_STREAMS: dict[str, tuple[bytes, Callable[[], Stream]]] = {
    "gzip": (b"\x1f\x8b", _Gzip),
    "zstd": (b"\x28\xb5\x2f\xfd", _zstd),
}


class Expander:
    """Expands a compressed file. `kind`: gzip or zstd."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._magic, self._open = _STREAMS[kind]
        self._stream: Stream | None = self._open()
        self._read = self._written = 0
        self._rest = b""
        self._full = False
        """Whether the last piece had the maximum length, so that more output may follow without more input."""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yields the bytes that `chunk` expands to, in pieces. Raises InvalidRows."""
        self._read += len(chunk)
        chunk, self._rest = self._rest + chunk, b""
        while chunk or (self._full and self._stream is not None):
            if self._stream is None:
                chunk = self._begin_next(chunk)
                if self._stream is None:
                    return
            piece = self._expand(self._stream, chunk)
            chunk = b""
            if self._stream.eof:
                chunk, self._stream = self._stream.unused_data, None
            if piece:
                self._count(len(piece))
                yield piece

    def close(self) -> None:
        """Ends the file. Raises InvalidRows if it is truncated."""
        if self._stream is not None:
            raise self._refuse("is incomplete. Compress it again, or send it again.")
        if self._rest:
            raise self._refuse(_FOLLOWED)

    def _expand(self, stream: Stream, chunk: bytes) -> bytes:
        try:
            piece = stream.decompress(chunk, PIECE_BYTES)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (each library has a class of its own, and one is imported late)
            raise self._refuse(f"is damaged: {error}. Compress it again, or send it again.") from None
        self._full = len(piece) == PIECE_BYTES
        return piece

    def _begin_next(self, chunk: bytes) -> bytes:
        """Begins the next stream after one that has ended, if any. gzip may be padded with zeros."""
        chunk = chunk.lstrip(b"\0") if self.kind == "gzip" else chunk
        if chunk.startswith(self._magic):
            self._stream, self._full = self._open(), False
            return chunk
        if not self._magic.startswith(chunk[: len(self._magic)]):
            raise self._refuse(_FOLLOWED)
        self._rest = chunk
        return b""

    def _count(self, expanded: int) -> None:
        self._written += expanded
        if self._written > MOST_BYTES:
            raise self._refuse(f"expands to more than {MOST_BYTES // 2**30} GiB. Split it into several files.")
        if self._written > RATIO_FROM and self._written > MOST_RATIO * self._read:
            raise self._refuse(f"expands to more than {MOST_RATIO} times its size. Send it uncompressed.")

    def _refuse(self, reason: str) -> InvalidRows:
        return InvalidRows(param="file", format=self.kind, line=1, reason=f"the file {reason}")


_FOLLOWED = "is followed by uncompressed data. Send only the compressed file."


def recognise(head: bytes) -> str | None:
    """Returns how a file that begins with `head` is compressed; None if it is not."""
    return next((kind for kind, (magic, _) in _STREAMS.items() if head.startswith(magic)), None)
