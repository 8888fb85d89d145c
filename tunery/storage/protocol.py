"""What every storage does, and the half of it that does not depend on where the bytes go."""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tunery.storage.errors import ChecksumMismatch

CHUNK = 2**20
"""Bytes per chunk of a read."""
PRESIGN_SECONDS = 900
"""How long a presigned URL works: long enough to start a download with, short enough to be found in a log too late."""


Check = Callable[[], None]
"""Is called again and again during long work, and raises where it is not to go on."""


@dataclass(frozen=True)
class Stored:
    """What lies under a key now: its size in bytes and its sha256 in hex."""

    key: str
    bytes: int
    sha256: str


class Storage(Protocol):
    """Where objects lie. Every method may raise StorageFailed (try again); writes that raise leave nothing behind."""

    def writer(self, key: str, content_type: str | None = None) -> contextlib.AbstractContextManager["Writer"]:
        """Stream an object in. It appears whole at the block's clean end, replacing an older one, or not at all."""

    def put(self, key: str, data: bytes, if_absent: bool = False) -> Stored:
        """Store a small object. Raises KeyTaken with `if_absent` where one is: of many writers exactly one wins."""

    def put_file(self, key: str, path: Path) -> Stored:
        """Store a local file. Size and sha256 in the answer are those of the bytes that were sent."""

    def read(self, key: str, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on, in chunks; none past the end. Raises ObjectMissing at once, not with a chunk."""

    def fetch(self, key: str, path: Path, sha256: str, check: Check = lambda: None) -> None:
        """Bring an object to a local file. Raises ObjectMissing, ChecksumMismatch, and what `check` raises between two
        chunks; then `path` is untouched."""

    def presign(self, key: str, *, filename: str, seconds: int = PRESIGN_SECONDS) -> str | None:
        """A URL that downloads this one object as `filename` without any key; None where storage cannot do that."""

    def stat(self, key: str) -> int | None:
        """Size in bytes, None where there is no such object."""

    def delete(self, key: str) -> None:
        """Forget an object; no error where there is none."""

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with `prefix`, in no order: S3 servers do not agree on one."""

    def sweep(self, older_than_seconds: float = 86_400) -> int:
        """Remove what writers that died left half-written. Returns how many."""


_PART_OF_KEY = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")


def check_key(key: str) -> str:
    """Returns the key itself, if it is one: parts joined by `/`, none hidden, `..` or empty. Raises ValueError.

    A wrong key is a fault of ours or a forged manifest, never a user's typing error, hence no message for users.
    """
    parts = key.split("/")
    if len(key.encode()) > 900 or any(len(p.encode()) > 255 or not _PART_OF_KEY.fullmatch(p) for p in parts):
        raise ValueError(f"{key!r} is no storage key: use 1 to 900 bytes, parts joined by '/', none starting with '.'")
    return key


class Sink(Protocol):
    """The half of a writer that knows where bytes go."""

    def write(self, data: bytes) -> None: ...

    def finish(self) -> None: ...

    def discard(self) -> None: ...


class Writer:
    """Counts and hashes what it passes on. `stored` is there after a clean end of the `with` block."""

    def __init__(self, key: str, sink: Sink) -> None:
        self._key, self._sink = key, sink
        self._sha256, self._bytes = hashlib.sha256(), 0
        self._stored: Stored | None = None

    def write(self, data: bytes) -> None:
        self._sha256.update(data)
        self._bytes += len(data)
        self._sink.write(data)

    @property
    def stored(self) -> Stored:
        if self._stored is None:
            raise RuntimeError(f"'{self._key}' is not stored until its `with` block has ended")
        return self._stored

    def finish(self) -> None:
        self._sink.finish()
        self._stored = Stored(self._key, self._bytes, self._sha256.hexdigest())


@contextlib.contextmanager
def writing(key: str, sink: Sink) -> Iterator[Writer]:
    writer = Writer(key, sink)
    try:
        yield writer
        writer.finish()
    except BaseException:  # KeyboardInterrupt too: half an object must not stay
        sink.discard()
        raise


def copy(path: Path, writer: Writer) -> None:
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            writer.write(data)


def fetch(storage: Storage, key: str, path: Path, expected: str, check: Check) -> None:
    """Into a neighbour of `path` first: a reader of `path` never sees half a file nor a wrong one."""
    found = hashlib.sha256()
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for data in storage.read(key):
                check()
                found.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if found.hexdigest() != expected:
            raise ChecksumMismatch(key=key, expected=expected, found=found.hexdigest())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
