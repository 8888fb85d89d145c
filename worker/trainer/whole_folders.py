"""Writes folders that are complete or absent: under a temporary name, flushed to disk and renamed."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tunery.failures import DiskFull


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder. Raises DiskFull, after which the partial folder is removed and an earlier one is kept."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with room_for(f"{path.parent.name}/{path.name}", path.parent, partial):
        partial.mkdir(parents=True)
        write(partial)
        for file in partial.rglob("*"):
            _flush(file)
        _flush(partial)
    shutil.rmtree(path, ignore_errors=True)  # a run that resumed from an older snapshot may write it again
    partial.rename(path)
    _flush(path.parent)


@contextmanager
def room_for(what: str, folder: Path, partial: Path) -> Iterator[None]:
    """Removes `partial` if the block fails. Raises DiskFull, which names the newest state in `folder`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
        if _is_full(error):
            raise DiskFull(what=what, kept=_kept(folder)) from error
        raise


def _is_full(error: OSError | SafetensorError) -> bool:
    """Whether a write failed because the disk is full; safetensors only says so in its message."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"os error {number}" in str(error) for number in full)


def _kept(folder: Path) -> str:
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]
    return f"The state of step {max(steps)} is intact and is kept." if steps else "No state had been saved."


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_old(folder: Path, keep: int, spared: int | None = None) -> None:
    """Removes all but the newest `keep` folders and that of the step `spared`."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
    for step in steps[:-keep]:
        if step != spared:
            shutil.rmtree(folder / f"step-{step}")
