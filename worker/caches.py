"""Removes what this host has cached from files that no project holds any more.

An entry's name is its file's sha256, a hyphen, and a digest of everything else that its content depends on. The names
of all other files in these folders begin with a dot.
"""

from collections.abc import Iterator
from pathlib import Path

from tunery import db
from tunery.datasets import files
from worker.io import verdicts
from worker.supervisor import staging

FOLDERS = (staging.PREPARED, verdicts.NAME)
_AT_ONCE = 1000


def remove_orphans(models_dir: Path) -> None:
    """Removes the entries of deleted and expired files, and of rows that were never a file, such as replay's."""
    entries = list(_entries(models_dir))
    for start in range(0, len(entries), _AT_ONCE):
        some = {path: path.name.partition("-")[0] for path in entries[start : start + _AT_ONCE]}
        with db.transaction() as session:
            known = files.known_contents(session, set(some.values()))
        for path, sha256 in some.items():
            if sha256 not in known:
                path.unlink(missing_ok=True)  # another worker of this host may have removed it


def _entries(models_dir: Path) -> Iterator[Path]:
    for name in FOLDERS:
        yield from (path for path in (models_dir / name).glob("*") if not path.name.startswith("."))
