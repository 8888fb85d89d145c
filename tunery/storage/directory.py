"""Objects as files, for one host: the embedded stack and small installations."""

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tunery.storage.errors import KeyTaken, ObjectMissing, StorageFailed
from tunery.storage.protocol import CHUNK, PRESIGN_SECONDS, Check, Stored, Writer, check_key, copy, fetch, writing

_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class Directory:
    """Objects as files below `root`. Half-written ones lie in `root/.tmp`: on one file system a rename is atomic."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._temporary = self._root / ".tmp"
        self._temporary.mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        _FileSink(self._temporary, "check", self._temporary).discard()

    @contextlib.contextmanager
    def _translated(self, action: str, key: str) -> Iterator[None]:
        """Translates the system's errors. Without our own folder, an absent object is no loss but a missing mount."""
        try:
            yield
        except OSError as error:
            if not isinstance(error, _ABSENT):
                raise _failure(action, error) from error
            if not os.path.isdir(self._temporary):  # noqa: PTH112 (Path's raises errors of a mount that is stale)
                raise StorageFailed(action=action, reason=f"'{self._root}' is gone or not mounted") from error
            raise ObjectMissing(key=key) from None

    def _path(self, key: str) -> Path:
        path = self._root / check_key(key)
        with self._translated("look up", key):
            # The key is checked already, but a symbolic link below the root could still lead out of it.
            is_below = path.resolve().is_relative_to(self._root)
        if not is_below:
            raise ValueError(f"{key!r} leads out of the storage directory through a symbolic link")
        return path

    def writer(
        self,
        key: str,
        content_type: str | None = None,  # noqa: ARG002 (files have no content type)
    ) -> contextlib.AbstractContextManager[Writer]:
        return writing(key, _FileSink(self._temporary, key, self._path(key)))

    def put(self, key: str, data: bytes, if_absent: bool = False) -> Stored:
        with writing(key, _FileSink(self._temporary, key, self._path(key), if_absent=if_absent)) as writer:
            writer.write(data)
        return writer.stored

    def put_file(self, key: str, path: Path) -> Stored:
        with self.writer(key) as writer:
            copy(path, writer)
        return writer.stored

    def read(self, key: str, start: int = 0) -> Iterator[bytes]:
        with self._translated("read", key):
            file = self._path(key).open("rb")
            file.seek(start)

        def chunks() -> Iterator[bytes]:
            with file:
                while data := read():
                    yield data

        def read() -> bytes:
            with self._translated("read", key):
                return file.read(CHUNK)

        return chunks()

    def fetch(self, key: str, path: Path, sha256: str, check: Check = lambda: None) -> None:
        fetch(self, key, path, sha256, check)

    def presign(self, key: str, *, filename: str, seconds: int = PRESIGN_SECONDS) -> str | None:  # noqa: ARG002
        return None  # a directory has no server: the API streams from it

    def stat(self, key: str) -> int | None:
        with contextlib.suppress(ObjectMissing), self._translated("look up", key):
            found = self._path(key).stat()
            return found.st_size if stat.S_ISREG(found.st_mode) else None
        return None

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(ObjectMissing), self._translated("delete", key):
            path.unlink()
        for folder in path.parents:
            if folder == self._root:
                break
            try:
                folder.rmdir()
            except OSError:  # not empty, or gone already
                break

    def list(self, prefix: str) -> Iterator[str]:
        def failed(error: OSError) -> None:
            # A folder that cannot be read is not an empty one: the caller would take its objects for deleted.
            with contextlib.suppress(ObjectMissing), self._translated("list", prefix):
                raise error

        for folder, folders, files in os.walk(self._root / prefix.rpartition("/")[0], onerror=failed):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = Path(folder).relative_to(self._root)
            yield from (key for name in files if (key := (below / name).as_posix()).startswith(prefix))

    def sweep(self, older_than_seconds: float = 86_400) -> int:
        limit = time.time() - older_than_seconds
        swept = 0
        for path in self._temporary.iterdir():
            with contextlib.suppress(FileNotFoundError):  # its writer has just finished
                if path.stat().st_mtime < limit:
                    path.unlink()
                    swept += 1
        return swept


class _FileSink:
    """Writes by temporary file, fsync, rename, fsync of the folder: after a power cut the object is whole or absent."""

    def __init__(self, temporary: Path, key: str, path: Path, *, if_absent: bool = False) -> None:
        self._key, self._path, self._if_absent = key, path, if_absent
        with self._failing("open"):
            handle, name = tempfile.mkstemp(dir=temporary)
        self._file, self._name = os.fdopen(handle, "wb"), Path(name)

    @contextlib.contextmanager
    def _failing(self, action: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise KeyTaken(key=self._key) from None
        except OSError as error:
            raise _failure(action, error) from error

    def write(self, data: bytes) -> None:
        with self._failing("write"):
            self._file.write(data)

    def finish(self) -> None:
        with self._failing("write"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._move()
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _move(self) -> None:
        for _ in range(10):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # A delete of the folder's last object may remove it between the two lines: then make it again.
            with contextlib.suppress(FileNotFoundError):
                return self._link() if self._if_absent else self._rename()
        raise OSError(f"'{self._path.parent}' vanished ten times")

    def _rename(self) -> None:
        self._name.replace(self._path)

    def _link(self) -> None:
        os.link(self._name, self._path)  # unlike rename, fails where the name exists
        self._name.unlink()

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._name.unlink(missing_ok=True)


def _failure(action: str, error: OSError) -> StorageFailed:
    return StorageFailed(action=action, reason=error.strerror or type(error).__name__)
