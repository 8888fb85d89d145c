"""Uploads folders and logs to storage, during a run or after it."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

from tunery.artifacts import manifest
from tunery.artifacts.manifest import Manifest
from tunery.storage import Storage
from tunery.storage.errors import KeyTaken, StorageFailed

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 900
"""How long an attempt waits for failing storage before it goes on without it or breaks off."""
_CHUNK = 1 << 20
_BYTES_A_SECOND = 50e6
_Result = TypeVar("_Result")


def insist(
    operation: Callable[[], _Result], *, give_up: Callable[[], bool], seconds: float = PATIENCE_SECONDS
) -> _Result:
    """Calls `operation`, and retries while storage fails. Raises StorageFailed after `seconds`, or once `give_up()`."""
    delay, deadline = 0.5, time.monotonic() + seconds
    while True:
        try:
            return operation()
        except StorageFailed:
            if give_up() or time.monotonic() > deadline:
                raise
            log.warning("storage fails; trying again in %.1f s", delay)
        time.sleep(delay)
        delay = min(2 * delay, 15)


def publish(storage: Storage, prefix: str, folder: Path) -> Manifest:
    """Stores a folder under a prefix that only this attempt uses; publishing it twice has the effect of once.

    Raises StorageFailed, and FileNotFoundError if the trainer has removed the folder meanwhile.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        return manifest.publish(storage, prefix, folder)[0]
    except KeyTaken:
        # This attempt's own manifest, whose confirmation was lost: no other attempt writes under this prefix. Files
        # were sent again before it was found, so it must describe the local folder.
        return manifest.describe(folder)


class UploadPace:
    """Estimates how long uploads take, by those so far; before the first one, by a slow network's speed."""

    def __init__(self) -> None:
        self._bytes, self._seconds = 0, 0.0

    def note(self, bytes: int, seconds: float) -> None:
        """Adds a finished upload to the estimate."""
        self._bytes += bytes
        self._seconds += seconds

    def seconds(self, bytes: int) -> float:
        """Returns the estimated time for this many bytes."""
        return bytes * (self._seconds / self._bytes if self._bytes else 1 / _BYTES_A_SECOND)


class LogShipper:
    """Uploads a log file's new lines every few seconds, as objects `<prefix>-<part>` that never change."""

    def __init__(self, storage: Storage, path: Path, prefix: str, *, every: float = 2) -> None:
        self._storage, self._path, self._prefix, self._every = storage, path, prefix, every
        self._sent, self._parts = 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tunery-log", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._ship(rest=True)

    def _run(self) -> None:
        while not self._over.wait(self._every):
            self._ship()

    def _ship(self, *, rest: bool = False) -> None:
        try:
            while text := self._next(rest=rest):
                self._storage.put(f"{self._prefix}-{self._parts:06d}", text)
                self._sent += len(text)
                self._parts += 1
        except (StorageFailed, OSError) as error:  # once storage is back, the log continues where it stopped
            log.warning("no log sent to %s: %s", self._prefix, error)

    def _next(self, *, rest: bool) -> bytes:
        """Returns whole lines only, to split no character, unless nothing will follow or a line fills a chunk."""
        if not self._path.exists():
            return b""
        with self._path.open("rb") as file:
            file.seek(self._sent)
            text = file.read(_CHUNK)
        if rest or len(text) == _CHUNK:
            return text
        return text[: text.rfind(b"\n") + 1]
