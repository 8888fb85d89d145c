"""Removes what this host keeps of files that no project has any more.

Entries of the folders are named by their file's sha256, a hyphen, and the digest of what else decides about them.
Others' names begin with a dot.
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
    """Removes the entries of deleted and expired files, and of rows that never were a file, as replay's."""
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
