"""Confidence intervals of shares, and of their differences on the same rows."""

import math


def paired_interval(both: int, only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares on the same n rows.

    Newcombe 1998, Statistics in Medicine 17:2635-2650, method 10: Wilson intervals of each share, combined with the
    correlation of the pairs. Holds near 0 and 1 too, where the usual normal interval has no width.
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


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share, square = right / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
