"""Rows that an earlier run on this host has prepared, so that a second job on a file and a model prepares nothing.

The run directory's `prepared/`, if it has one, is shared by the host's runs. An entry there is named by the file's
sha256, by which it goes with the file, and the digest of all that decides about its tokens (`key`), and written whole
or not at all:

    the rows as a `Store` keeps them, some numbers of each row and line, how many there are of each, sha256 of all that

What is damaged is prepared again. Entries that nobody has used for DAYS go, as they hold what users wrote, and the
oldest where all together are more than FRACTION of the disk.
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

from tunery import processes
from tunery.rows import bulk, fingerprint
from tunery.rows.encoding import RowEncoder
from tunery.rows.messages import FileRole
from tunery.rows.template import ChatTemplate
from worker.trainer import blocks
from worker.trainer.stored_rows import Store

log = logging.getLogger(__name__)

NAME = "prepared"
DAYS = 7
FRACTION = 0.1
_COUNTS = struct.Struct("<6q")
_SHA256_BYTES = 32
_PIECE_BYTES = 2**20
_LOCK_SECONDS = 0.2
_PARTIAL = ".partial-"

Lines = tuple[int, ...]
Prepared = tuple[Store, Lines, Lines]
"""A file's rows, and the lines that were cut or left out: see `data.Rows`."""


def key(path: Path, template: ChatTemplate, encoder: RowEncoder, role: FileRole, max_length: int) -> str | None:
    """Returns the name of a file's rows; None where a plug-in's code or the clock decides about them too."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    found = fingerprint.of_rows(sha256, bulk.Reading(role, encoder, template, max_length), blocks)
    return found and f"{sha256}-{found}"


@contextmanager
def turn(folder: Path, name: str) -> Iterator[None]:
    """One run, or rank, at a time: who waits finds what the other has prepared."""
    with (folder / f".{name}.lock").open("a") as file:
        while not processes.lock(file):
            time.sleep(_LOCK_SECONDS)
        yield


def find(folder: Path, name: str) -> Prepared | None:
    """Returns the entry of that name; None where there is none that is whole."""
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
            log.warning("%s is damaged, and its rows are prepared again", path)
            path.unlink(missing_ok=True)
            return None
        unless_read.pop_all()
    os.utime(path)  # it was used
    return found


def save(folder: Path, name: str, prepared: Prepared) -> None:
    """Writes an entry in place of others for which there is no room then. Where the disk is full there is none."""
    size = prepared[0].size
    _tidy(folder, size)
    if size > _most(folder):
        return
    unfinished = folder / f"{_PARTIAL}{name}"  # nobody else writes it: it is this run's turn
    try:
        unfinished.touch(mode=0o600)  # what users wrote
        with unfinished.open("wb") as file:
            _write(file, *prepared)
        unfinished.replace(folder / name)
    except OSError as error:  # what has been prepared can be trained on all the same
        log.warning("the prepared rows are not kept: %s", error)
        unfinished.unlink(missing_ok=True)


def _write(file: IO[bytes], store: Store, truncated: Lines, unlearnable: Lines) -> None:
    numbers = [*store.numbers, array("q", truncated), array("q", unlearnable)]
    counts = _COUNTS.pack(store.size, *map(len, numbers))
    digest = hashlib.sha256()
    for piece in chain(store.pieces(), (each.tobytes() for each in numbers), [counts]):
        file.write(piece)
        digest.update(piece)
    file.write(digest.digest())


def _read(file: IO[bytes]) -> Prepared | None:
    """Returns what is in an entry; None where it is not what was written."""
    end = os.fstat(file.fileno()).st_size - _SHA256_BYTES - _COUNTS.size
    if end < 0 or not _is_whole(file, end + _COUNTS.size):
        return None
    start, *counts = _COUNTS.unpack(os.pread(file.fileno(), _COUNTS.size, end))
    numbers = []
    for count in counts:
        numbers.append(array("q", os.pread(file.fileno(), 8 * count, start)))
        start += 8 * count
    *of_rows, truncated, unlearnable = numbers
    return Store(file, *of_rows), tuple(truncated), tuple(unlearnable)


def _is_whole(file: IO[bytes], size: int) -> bool:
    digest = hashlib.sha256()
    while size > 0 and (piece := file.read(min(size, _PIECE_BYTES))):
        digest.update(piece)
        size -= len(piece)
    return digest.digest() == file.read()


def _tidy(folder: Path, needed: int) -> None:
    """Removes what is old, then what was used longest ago until there is room for so many bytes more."""
    entries = sorted((entry for entry in folder.iterdir() if entry.is_file()), key=_used)
    old = time.time() - DAYS * 24 * 3600
    left = sum(_size(entry) for entry in entries) + needed - _most(folder)
    for entry in entries:
        if _used(entry) < old or (left > 0 and not entry.name.startswith(".")):
            left -= _size(entry)
            entry.unlink(missing_ok=True)


def _most(folder: Path) -> int:
    return int(shutil.disk_usage(folder).total * FRACTION)


def _used(entry: Path) -> float:
    with suppress(FileNotFoundError):  # another run has removed it meanwhile
        return entry.stat().st_mtime
    return 0.0


def _size(entry: Path) -> int:
    with suppress(FileNotFoundError):
        return entry.stat().st_size
    return 0
