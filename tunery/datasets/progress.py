"""A progress file: written by a working process, read by the worker that waits for it."""

from pathlib import Path

NAME = "progress"


def write(folder: Path, fraction: float) -> None:
    """Notes the share that is done, 0 to 1."""
    # Renamed into place, so that a reader never sees half a number.
    (folder / f"{NAME}.new").write_text(f"{fraction:.3f}")
    (folder / f"{NAME}.new").rename(folder / NAME)


def read(folder: Path) -> float | None:
    """Returns the share that was noted last."""
    path = folder / NAME
    return float(path.read_text()) if path.exists() else None
