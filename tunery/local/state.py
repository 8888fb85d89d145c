"""The file in a stack's home by which other commands on this machine find it."""

import json
from pathlib import Path
from typing import Any

from tunery.local import lock

_NAME = "stack.json"


def write(home: Path, state: dict[str, Any]) -> None:
    """Writes the state, readable only by its owner: with the database's address no API key is needed."""
    unfinished = home / f"{_NAME}.part"
    unfinished.touch(mode=0o600)
    unfinished.write_text(json.dumps(state))
    unfinished.rename(home / _NAME)


def remove(home: Path) -> None:
    (home / _NAME).unlink(missing_ok=True)


def read(home: Path) -> dict[str, Any] | None:
    """Returns the last written state, whether or not that stack still runs."""
    try:
        return dict(json.loads((home / _NAME).read_text()))
    except (OSError, ValueError):
        return None


def running(home: Path) -> dict[str, Any] | None:
    """Returns the state of the stack running in `home`; None if none runs there."""
    found = read(home)
    return found if found and found["pid"] == lock.owner(home) else None
