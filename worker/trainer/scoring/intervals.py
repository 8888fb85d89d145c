"""Confidence intervals of fractions and means, and of their differences on the same rows."""

import math
from collections.abc import Sequence

import torch

from tunery.planning.intervals import wilson


def paired_interval(both: int, only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares on the same n rows.

    Newcombe 1998, Statistics in Medicine 17:2635-2650, method 10: Wilson intervals of each fraction, combined with the
    correlation of the pairs. It also holds near 0 and 1, where the usual normal interval has no width.
    """
    neither = n - both - only_first - only_second
    first, second = (both + only_first) / n, (both + only_second) / n
    (low_1, high_1), (low_2, high_2) = wilson(both + only_first, n), wilson(both + only_second, n)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    cross = both * neither - only_first * only_second
    phi = 0.0 if margins == 0 else (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(margins)
    down, up = first - low_1, high_2 - second
    below = math.sqrt(max(0.0, down * down - 2 * phi * down * up + up * up))
    down, up = high_1 - first, second - low_2
    above = math.sqrt(max(0.0, down * down - 2 * phi * down * up + up * up))
    return first - second - below, first - second + above


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the exact two-sided p-value of McNemar's test on the rows on which two models differ.

    McNemar 1947, Psychometrika 12:153-157; the exact form is a binomial test of a fair coin.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail: float = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    return min(1.0, 2 * tail)


_INDEXES = 2**18
"""Rows that are drawn at once: each takes 40 bytes."""
Parts = Sequence[tuple[float, float]]
"""For each row, its part of the numerator and of the denominator of a figure."""


def bootstrap_interval(first: Parts, second: Parts, *, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """Returns the 95 % interval of two figures' difference on the same rows: percentiles of a paired bootstrap.

    Efron and Tibshirani 1993, chapter 13. Rows are drawn with replacement, for both models together; the same seed
    gives the same interval. With fewer than about 20 rows it is too narrow.
    """
    rows = torch.tensor([[*a, *b] for a, b in zip(first, second, strict=True)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    together = max(1, _INDEXES // len(rows))
    gains = []
    for start in range(0, draws, together):
        shape = min(together, draws - start), len(rows)
        sums = rows[torch.randint(len(rows), shape, generator=generator)].sum(1)
        gains.append(sums[:, 0] / sums[:, 1].clamp(min=1e-12) - sums[:, 2] / sums[:, 3].clamp(min=1e-12))
    low, high = torch.cat(gains).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
