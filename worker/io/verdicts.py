"""Keeps on this host what validation has found in files, so that a second job on a file and a model reads no row.

An entry is in `validated/` of the models folder, named by the file's sha256 and a digest of all that its content
depends on. It is removed with the file, or when no job has used it for DAYS. It holds line numbers, names of keys and
digests of rows, but none of their text.
"""

import base64
import hashlib
import json
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from tunery.datasets.rules import Overlap, Summary
from tunery.rows import encoding
from tunery.rows.bulk import Reading
from tunery.rows.messages import FileRole
from tunery.rows.shapes import FileShape

NAME = "validated"
DAYS = 7
_ENTRY = struct.Struct("<Q16s")
"""A row's number and the digest of its conversation."""
_TEXTS = ("rendered", "spoken")


class Recorded(Overlap):
    """The overlap of a job's files, which also keeps the numbers and digests of the file being read."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = bytearray()

    def add(self, role: FileRole, number: int, digest: bytes) -> None:
        """Does what Overlap's does. Every row of a good file comes here, in order."""
        super().add(role, number, digest)
        self.rows += _ENTRY.pack(number, digest)

    def replay(self, role: FileRole, rows: bytes) -> None:
        """Adds the rows of a file that was read before."""
        for number, digest in _ENTRY.iter_unpack(rows):
            self.add(role, number, digest)


def find(path: Path, reading: Reading, read: Callable[[], Iterator[bytes]], overlap: Recorded) -> Summary | None:
    """Returns the summary of a file that was read before; None if there is no intact one. `read` yields the file's
    bytes, of which only the first row is read.
    """
    try:
        digest, body = path.read_bytes().split(b"\n", 1)
    except (FileNotFoundError, ValueError):
        return None
    if digest != _digest(body):
        return None
    path.touch()
    kept = json.loads(body)
    overlap.replay(reading.role, base64.b64decode(kept.pop("rows")))
    return _summary(kept, _shape(kept.pop("used"), reading, read()))


def save(path: Path, summary: Summary, overlap: Recorded) -> None:
    """Keeps what was found in a good file; on a full disk, nothing."""
    kept: dict[str, Any] = {item.name: getattr(summary, item.name) for item in fields(summary) if item.compare}
    kept |= {"used": summary.shape.used, "rows": base64.b64encode(overlap.rows).decode()}
    body = json.dumps(kept).encode()
    partial = path.with_name(f".{path.name}.partial")
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        _tidy(path.parent)
        partial.write_bytes(_digest(body) + b"\n" + body)
        partial.replace(path)


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def _summary(kept: dict[str, Any], shape: FileShape) -> Summary:
    """Rebuilds a summary from JSON, with its own types."""
    spelled = {int(number): tuple(tokens) for number, tokens in kept.pop("spelled").items()}
    rendered, spoken = ({int(number): text for number, text in kept.pop(name).items()} for name in _TEXTS)
    answers = [(number, tokens) for number, tokens in kept.pop("answer_tokens")]
    return Summary(**kept, spelled=spelled, rendered=rendered, spoken=spoken, answer_tokens=answers, shape=shape)


def _shape(used: dict[str, str], reading: Reading, chunks: Iterator[bytes]) -> FileShape:
    """Returns the file's shape, which its first row determines."""
    shape = FileShape(reading.encoder.columns)
    reading.encoder.parse(next(encoding.read_rows(chunks, reading.role, shape)), reading.role)
    shape.used |= used
    return shape


def _tidy(folder: Path) -> None:
    old = time.time() - DAYS * 24 * 3600
    for entry in folder.iterdir():
        with suppress(FileNotFoundError):  # another worker has removed it already
            if entry.stat().st_mtime < old:
                entry.unlink()
