"""Measures how many different prompts a file has, counting similar ones as one."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tunery.datasets.report import groups
from tunery.datasets.report.case import Case, Finding

_FRACTION = 0.2
_LEAST = 20
"""Minimum rows for meaningful shares."""
_ACTION = "Keep fewer of them, or add rows that ask something else."


def clusters(case: Case) -> dict[int, int]:
    """Returns each line's cluster of rows linked by a chain of similar questions, named by its first line."""
    similar = ((pair.first.line, pair.second.line) for pair in case.pairs if not pair.leaked)
    return groups.join((row.line for row in case.compared), similar)


def figures(case: Case) -> dict[str, Any]:
    """Returns `effective_prompts`, the exponential of the entropy of the clusters' shares (the number of clusters if
    all are equally large), and `largest_cluster`, the largest one's share of the rows."""
    sizes = Counter(clusters(case).values())
    rows = sizes.total()
    if not rows:
        return {}
    entropy = -sum(size / rows * math.log(size / rows) for size in sizes.values())
    return {
        "prompts": len(sizes),
        "effective_prompts": round(math.exp(entropy), 1),
        "largest_cluster": round(max(sizes.values()) / rows, 4),
    }


def find(case: Case) -> Iterator[Finding]:
    """Finds clusters of similar questions that are a large share of the rows."""
    found = clusters(case)
    for cluster, size in Counter(found.values()).most_common(3):
        if size >= _LEAST and size >= _FRACTION * len(found):
            lines = [line for line, other in found.items() if other == cluster]
            why = f"{size / len(found):.0%} of the rows ask nearly the same as line {cluster}."
            yield Finding("low_diversity", lines, size / len(found), why, _ACTION)
