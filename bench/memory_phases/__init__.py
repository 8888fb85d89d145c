"""A plug-in with which a trainer logs where its peak memory grew; `read_phases` reads it from the log."""

from collections.abc import Iterable

MARK = "peak of memory after "


def read_phases(log: Iterable[str]) -> dict[str, int]:
    """Returns the peak in bytes after each part of a run that raised it, as of the last time that the part did."""
    found: dict[str, int] = {}
    for line in log:
        _, marked, said = line.partition(MARK)
        if marked:
            part, _, size = said.partition(": ")
            found.pop(part, None)
            found[part] = int(size)
    return found
