"""The storage protocol, and the part of it that is the same for every storage."""

import contextlib
import hashlib
import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from tunery.storage.errors import ChecksumMismatch

CHUNK = 2**20
"""Bytes per chunk of a read."""
_BEHIND = 8
"""The most chunks of a download that wait to be hashed: they are held in memory."""
_UNSYNCED = 2**24
"""Bytes of a download after which the disk begins to write them, so that little is left at its end."""
PRESIGN_SECONDS = 900
"""Seconds that a presigned URL works: enough to start a download, too few for one that leaks into a log."""


Check = Callable[[], None]
"""Called repeatedly during long work; raises to stop it."""


@dataclass(frozen=True)
class Stored:
    """A stored object: its key, its size in bytes and its sha256 in hex."""

    key: str
    bytes: int
    sha256: str


class Storage(Protocol):
    """A store of objects. Every method may raise StorageFailed (try again); a failed write leaves nothing behind."""

    def check(self) -> None:
        """Raises StorageFailed if the storage cannot be used now: StorageRefused if that will not change by itself."""

    def writer(self, key: str, content_type: str | None = None) -> contextlib.AbstractContextManager["Writer"]:
        """Returns a writer. The object appears at the block's clean end, replacing an older one, or not at all."""

    def put(self, key: str, data: bytes, if_absent: bool = False) -> Stored:
        """Stores a small object. With `if_absent`, raises KeyTaken if one exists: of many writers exactly one wins."""

    def put_file(self, key: str, path: Path) -> Stored:
        """Stores a local file. Returns size and sha256 of the bytes that were sent."""

    def read(self, key: str, start: int = 0) -> Iterator[bytes]:
        """Returns the bytes from `start` in chunks; none past the end. Raises ObjectMissing at once, not later."""

    def fetch(self, key: str, path: Path, sha256: str, check: Check = lambda: None) -> None:
        """Downloads an object to a local file. Raises ObjectMissing, ChecksumMismatch, and what `check` raises between
        two chunks; then `path` is unchanged."""

    def presign(self, key: str, *, filename: str, seconds: int = PRESIGN_SECONDS) -> str | None:
        """Returns a URL that downloads this object as `filename` without a key; None if unsupported."""

    def stat(self, key: str) -> int | None:
        """Returns the size in bytes, None if there is no such object."""

    def delete(self, key: str) -> None:
        """Deletes an object, if it exists."""

    def list(self, prefix: str) -> Iterator[str]:
        """Yields the keys that begin with `prefix`, in no particular order, as S3 servers differ."""

    def sweep(self, older_than_seconds: float = 86_400) -> int:
        """Removes unfinished objects of dead writers. Returns how many."""


_PART_OF_KEY = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")


def check_key(key: str) -> str:
    """Returns the key if valid: parts joined by `/`, none hidden, `..` or empty. Raises ValueError.

    A wrong key comes from a bug or a forged manifest, never from a user's typing error: hence no message for users.
    """
    parts = key.split("/")
    if len(key.encode()) > 900 or any(len(p.encode()) > 255 or not _PART_OF_KEY.fullmatch(p) for p in parts):
        raise ValueError(
            f"{key!r} is not a storage key: use 1 to 900 bytes, parts joined by '/', none starting with '.'"
        )
    return key


class Sink(Protocol):
    """The part of a writer that depends on the storage."""

    def write(self, data: bytes) -> None: ...

    def finish(self) -> None: ...

    def discard(self) -> None: ...


class Writer:
    """Counts and hashes the bytes that it writes. `stored` is set after a clean end of the `with` block."""

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
    """Downloads beside `path` and renames, so that a reader of `path` never sees a partial or wrong file."""
    found = hashlib.sha256()
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    try:
        # Hashing takes as long as all the rest, and lets another thread run meanwhile.
        with os.fdopen(handle, "wb") as file, ThreadPoolExecutor(1) as hashing, _Syncing(file) as syncing:
            behind: deque[Future[None]] = deque()
            for data in storage.read(key):
                check()
                behind.append(hashing.submit(found.update, data))
                if len(behind) > _BEHIND:
                    behind.popleft().result()
                file.write(data)
                syncing.go_on(len(data))
            syncing.finish()
        if found.hexdigest() != expected:
            raise ChecksumMismatch(key=key, expected=expected, found=found.hexdigest())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class _Syncing:
    """Has the disk write a file in another thread, while more is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._thread = ThreadPoolExecutor(1)
        self._unsynced = 0
        self._running: Future[None] | None = None

    def __enter__(self) -> "_Syncing":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def go_on(self, written: int) -> None:
        """Begins to sync what has been written, if it is much and the disk is idle. Raises OSError."""
        self._unsynced += written
        if self._unsynced >= _UNSYNCED and (self._running is None or self._running.done()):
            self._wait()
            self._file.flush()
            self._running, self._unsynced = self._thread.submit(os.fsync, self._file.fileno()), 0

    def finish(self) -> None:
        """Syncs the whole file. Raises OSError."""
        self._wait()
        self._file.flush()
        os.fsync(self._file.fileno())

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()  # the system tells an error once: the last fsync would not have it
