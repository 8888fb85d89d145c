"""The lock of a stack's home. A pid file alone is not enough: after a kill or a reboot another process may have it."""

import os
from pathlib import Path
from typing import IO

from tunery import processes

_NAME = "lock"


def take(home: Path) -> IO[str] | None:
    """Takes the home's lock, held until the file is closed or its process ends; None if another process has it."""
    lock = (home / _NAME).open("a+")
    # Retried for a second, because `is_held` takes the lock briefly.
    if not processes.wait_until(lambda: processes.lock(lock), seconds=1, alive=lambda: True):
        lock.close()
        return None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def is_held(home: Path) -> bool:
    """Whether a running process has locked the home."""
    try:
        with (home / _NAME).open() as lock:
            return not processes.lock(lock, shared=True)
    except FileNotFoundError:
        return False


def owner(home: Path) -> int | None:
    """Returns the pid of the process that has locked the home, or None."""
    written = (home / _NAME).read_text().strip() if is_held(home) else ""
    return int(written) if written.isdigit() else None
