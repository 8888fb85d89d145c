"""The sha256 of files, which identifies artifacts, snapshots and rows."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Returns a file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
