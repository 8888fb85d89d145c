"""Compares an adapter's trainable parameters with the answer tokens that it is to learn."""

from collections.abc import Mapping
from typing import Any

from tunery.planning import shape
from tunery.spec import MAX_RANK, Full, Lora, Technique

MOST_PER_TOKEN = 1000
"""Parameters per token above which an adapter can memorise the rows."""


def warnings(model_info: Mapping[str, Any], technique: Technique, tokens: int) -> list[str]:
    """Warns where the adapter has less than one parameter, or more than a thousand, for each token of an answer.

    Rules of thumb: a token is worth about one bit, and a parameter holds about two (Allen-Zhu and Li 2024,
    arXiv:2404.05405), so one parameter a token leaves a margin of two.
    """
    if isinstance(technique, Full) or not tokens:
        return []
    learns = shape.trainable_params(model_info, technique)
    sizes = f"{learns:,} parameters at rank {technique.r}, and the answers have about {tokens:,} tokens"
    if learns < tokens:
        return [f"The adapter may be too small: it has {sizes}. {_higher(technique, tokens / learns)}"]
    if learns > MOST_PER_TOKEN * tokens:
        least = "Use a lower r, or" if technique.r > 1 else "Add rows, or"
        text = f"The adapter can memorise the rows: it has {sizes}. {least} watch the validation loss."
        return [text]
    return []


def fit_rank(model_info: Mapping[str, Any], technique: Lora, tokens: int, *, least: int, most: int) -> int:
    """Returns the rank nearest to the technique's, by halving or doubling within `least` and `most`, without a
    warning."""

    def learns(rank: int) -> int:
        return shape.trainable_params(model_info, technique.model_copy(update={"r": rank}))

    rank = technique.r
    while tokens and learns(rank) > MOST_PER_TOKEN * tokens and rank // 2 >= least:
        rank //= 2
    while tokens and learns(rank) < tokens and rank * 2 <= most:
        rank *= 2
    return rank


def _higher(technique: Lora, times: float) -> str:
    """Returns which change gives `times` as many parameters, in words."""
    rank = technique.r
    while rank < technique.r * times:
        rank *= 2
    if rank > MAX_RANK:
        return "No rank is large enough: use technique 'full' with replay, or fewer rows."
    return f"Use r {rank}, which gives one parameter per token."
