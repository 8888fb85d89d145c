"""The lock of a stack's home. A pid in a file alone may be another process's after a kill or a reboot."""

import os
from pathlib import Path
from typing import IO

from tunery import processes

_NAME = "lock"


def take(home: Path) -> IO[str] | None:
    """Takes the home's lock, which lasts until the file is closed or its process ends; None when another has it."""
    lock = (home / _NAME).open("a+")
    # For a moment, not once: `is_held` has the lock while it looks.
    if not processes.wait_until(lambda: processes.lock(lock), seconds=1, alive=lambda: True):
        lock.close()
        return None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def is_held(home: Path) -> bool:
    """Whether a living process has the home."""
    try:
        with (home / _NAME).open() as lock:
            return not processes.lock(lock, shared=True)
    except FileNotFoundError:
        return False


def owner(home: Path) -> int | None:
    """Returns the pid of the process that has the home; None when there is none."""
    written = (home / _NAME).read_text().strip() if is_held(home) else ""
    return int(written) if written.isdigit() else None
