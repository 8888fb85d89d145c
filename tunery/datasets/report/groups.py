"""Groups lines that are linked, also through others."""

from collections.abc import Iterable


def join(lines: Iterable[int], links: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Returns each line's group, which its first line names."""
    parents = {line: line for line in lines}

    def first(line: int) -> int:
        while parents[line] != line:
            parents[line] = line = parents[parents[line]]
        return line

    for one, other in links:
        earlier, later = sorted((first(one), first(other)))
        parents[later] = earlier
    return {line: first(line) for line in parents}
