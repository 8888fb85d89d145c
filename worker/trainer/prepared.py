"""Keeps prepared rows on this host, so that a second job on the same file and model prepares nothing.

The run directory's `prepared/`, if there is one, is shared by the host's runs. An entry is named by the file's sha256,
so that it is removed with the file, and a digest of all that its tokens depend on (`key`). It is complete or absent:

    the rows as a `Store` keeps them, some numbers of each row and line, how many there are of each, sha256 of all that

Damaged entries are prepared again. Entries unused for DAYS are removed, as they hold users' text, and the oldest if all
together exceed a share of the disk: FRACTION, unless the worker's setting is another.
"""

import hashlib
import logging
import os
import shutil
import struct
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO

from tunery import digests, processes
from tunery.rows import bulk, fingerprint
from tunery.rows.encoding import RowEncoder
from tunery.rows.messages import FileRole
from tunery.rows.template import ChatTemplate
from worker.trainer import blocks
from worker.trainer.stored_rows import Store

log = logging.getLogger(__name__)

NAME = "prepared"
DAYS = 7
FRACTION, SETTING = 0.1, "TUNERY_PREPARED_FRACTION"
_COUNTS = struct.Struct("<6q")
_SHA256_BYTES, _NUMBER_BYTES = 32, 8
_PIECE_BYTES = 2**20
_LOCK_SECONDS = 0.2
_PARTIAL = ".partial-"

Lines = tuple[int, ...]
Prepared = tuple[Store, Lines, Lines]
"""A file's rows, and the lines truncated or left out: see `data.Rows`."""


def key(path: Path, template: ChatTemplate, encoder: RowEncoder, role: FileRole, max_length: int) -> str | None:
    """Returns the name of a file's entry; None if it also depends on a plug-in's code or the clock."""
    sha256 = digests.sha256(path)
    found = fingerprint.of_rows(sha256, bulk.Reading(role, encoder, template, max_length), blocks)
    return found and f"{sha256}-{found}"


@contextmanager
def turn(folder: Path, name: str) -> Iterator[None]:
    """Lets one run or rank in at a time: those that wait find what it has prepared."""
    with (folder / f".{name}.lock").open("a") as file:
        while not processes.lock(file):
            time.sleep(_LOCK_SECONDS)
        yield


def find(folder: Path, name: str) -> Prepared | None:
    """Returns the entry of that name; None if there is no intact one."""
    _tidy(folder, 0)
    path = folder / name
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with ExitStack() as unless_read:
        unless_read.callback(file.close)
        found = _read(file)
        if found is None:
            log.warning("%s is damaged: its rows are prepared again", path)
            path.unlink(missing_ok=True)
            return None
        unless_read.pop_all()
    os.utime(path)  # marks it as used
    return found


def save(folder: Path, name: str, prepared: Prepared) -> None:
    """Writes an entry, and removes others to make room. On a full disk, nothing is kept."""
    size = _bytes(*prepared)
    _tidy(folder, size)
    if size > _most(folder):
        return
    unfinished = folder / f"{_PARTIAL}{name}"  # nobody else writes it: this run holds the lock
    try:
        unfinished.touch(mode=0o600)  # it holds users' text
        with unfinished.open("wb") as file:
            _write(file, *prepared)
        unfinished.replace(folder / name)
    except OSError as error:  # the prepared rows can be trained on nevertheless
        log.warning("the prepared rows are not kept: %s", error)
        unfinished.unlink(missing_ok=True)


def _bytes(store: Store, truncated: Lines, unlearnable: Lines) -> int:
    """Returns the bytes that an entry takes on the disk."""
    numbers = sum(map(len, (*store.numbers, truncated, unlearnable)))
    return store.size + _NUMBER_BYTES * numbers + _COUNTS.size + _SHA256_BYTES


def _write(file: IO[bytes], store: Store, truncated: Lines, unlearnable: Lines) -> None:
    numbers = [*store.numbers, array("q", truncated), array("q", unlearnable)]
    counts = _COUNTS.pack(store.size, *map(len, numbers))
    digest = hashlib.sha256()
    for piece in chain(store.pieces(), (each.tobytes() for each in numbers), [counts]):
        file.write(piece)
        digest.update(piece)
    file.write(digest.digest())


def _read(file: IO[bytes]) -> Prepared | None:
    """Returns an entry's content; None if it is damaged."""
    end = os.fstat(file.fileno()).st_size - _SHA256_BYTES - _COUNTS.size
    if end < 0 or not _is_whole(file, end + _COUNTS.size):
        return None
    start, *counts = _COUNTS.unpack(os.pread(file.fileno(), _COUNTS.size, end))
    numbers = []
    for count in counts:
        numbers.append(array("q", os.pread(file.fileno(), _NUMBER_BYTES * count, start)))
        start += _NUMBER_BYTES * count
    *of_rows, truncated, unlearnable = numbers
    return Store(file, *of_rows), tuple(truncated), tuple(unlearnable)


def _is_whole(file: IO[bytes], size: int) -> bool:
    digest = hashlib.sha256()
    while size > 0 and (piece := file.read(min(size, _PIECE_BYTES))):
        digest.update(piece)
        size -= len(piece)
    return digest.digest() == file.read()


def _tidy(folder: Path, needed: int) -> None:
    """Removes old entries, then the least recently used until there is room for `needed` bytes."""
    entries = sorted((entry for entry in folder.iterdir() if entry.is_file()), key=_used)
    old = time.time() - DAYS * 24 * 3600
    left = sum(_size(entry) for entry in entries) + needed - _most(folder)
    for entry in entries:
        if _used(entry) < old or (left > 0 and not entry.name.startswith(".")):
            left -= _size(entry)
            entry.unlink(missing_ok=True)


def _most(folder: Path) -> int:
    return int(shutil.disk_usage(folder).total * float(os.environ.get(SETTING) or FRACTION))


def _used(entry: Path) -> float:
    with suppress(FileNotFoundError):  # another run may have removed it
        return entry.stat().st_mtime
    return 0.0


def _size(entry: Path) -> int:
    with suppress(FileNotFoundError):
        return entry.stat().st_size
    return 0
