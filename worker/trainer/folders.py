"""Checks links in a folder that becomes a base, and computes files' digests."""

import os
from pathlib import Path

from tunery.errors import UnusableModel


def refuse_links_out(source: str) -> None:
    """Raises UnusableModel if a link leaves the folder: its target would be published with the base.

    A snapshot in a hub's cache (`models--ORG--NAME/snapshots/REVISION`) may link to the blobs beside it.
    """
    folder = Path(source).resolve()
    allowed = [folder, *_blobs(folder)]
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in allowed):
                raise UnusableModel(
                    source=source,
                    reason=f"'{path.relative_to(folder)}' is a link to a file outside its folder. Replace it with a "
                    "copy of the file, or remove it.",
                )


def _blobs(folder: Path) -> list[Path]:
    repository = folder.parents[1] if folder.parent.name == "snapshots" else None
    return [repository / "blobs"] if repository is not None and repository.name.startswith("models--") else []
