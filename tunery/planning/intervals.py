"""Confidence intervals without resampling."""

import math


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the 95 % interval of a proportion (Wilson 1927)."""
    fraction, square = correct / n, z * z
    middle = (fraction + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(fraction * (1 - fraction) / n + square / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
