"""A plug-in under which a trainer logs where its peak of memory grew; `read_phases` finds it in the log."""

from collections.abc import Iterable

MARK = "peak of memory after "


def read_phases(log: Iterable[str]) -> dict[str, int]:
    """Returns the peak in bytes up to the end of each part of a run, for the last time that the part raised it."""
    found: dict[str, int] = {}
    for line in log:
        _, marked, said = line.partition(MARK)
        if marked:
            part, _, size = said.partition(": ")
            found.pop(part, None)
            found[part] = int(size)
    return found
