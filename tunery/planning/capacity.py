"""What an adapter can hold beside what it is to learn: parameters that learn against tokens of answers."""

from collections.abc import Mapping
from typing import Any

from tunery.planning import shape
from tunery.spec import MAX_RANK, Full, Lora, Technique

MOST_PER_TOKEN = 1000
"""Parameters a token above which an adapter has room to keep the rows themselves."""


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
        text = f"The adapter has room to learn the rows by heart: it has {sizes}. {least} watch the validation loss."
        return [text]
    return []


def fit_rank(model_info: Mapping[str, Any], technique: Lora, tokens: int, *, least: int, most: int) -> int:
    """The rank nearest to the technique's, by halves or doubles from `least` to `most`, that is not warned of."""

    def learns(rank: int) -> int:
        return shape.trainable_params(model_info, technique.model_copy(update={"r": rank}))

    rank = technique.r
    while tokens and learns(rank) > MOST_PER_TOKEN * tokens and rank // 2 >= least:
        rank //= 2
    while tokens and learns(rank) < tokens and rank * 2 <= most:
        rank *= 2
    return rank


def _higher(technique: Lora, times: float) -> str:
    """Returns what to change for so many times the parameters."""
    rank = technique.r
    while rank < technique.r * times:
        rank *= 2
    if rank > MAX_RANK:
        return "No rank holds that much: use technique 'full' with replay, or fewer rows."
    return f"Use r {rank}: that is one parameter a token."
