"""Measures answer speed: tokens and seconds of the passes, by base and by how models shared them."""

from collections.abc import Sequence
from dataclasses import dataclass

from tunery.serving import Chosen, Rate, Way


@dataclass
class _Sum:
    tokens: int = 0
    seconds: float = 0.0
    passes: int = 0


class Meter:
    """Counts what the loop's thread computes; other threads read it."""

    def __init__(self, *, computes_here: bool = True) -> None:
        """`computes_here`: if another program computes, the loop's time is that of waiting and is not counted."""
        self._computes_here = computes_here
        self._sums: dict[tuple[str, Way], _Sum] = {}

    def count(self, together: Sequence[Chosen], tokens: int, seconds: float) -> None:
        """Adds a pass of these answers' models, which produced so many tokens."""
        bases = {chosen.base.id for chosen in together}
        way = way_of(together)
        if self._computes_here and len(bases) == 1 and way is not None:
            found = self._sums.setdefault((bases.pop(), way), _Sum())
            found.tokens, found.seconds, found.passes = found.tokens + tokens, found.seconds + seconds, found.passes + 1

    @property
    def rates(self) -> list[Rate]:
        return [
            Rate(base=base, way=way, tokens=found.tokens, seconds=found.seconds, passes=found.passes)
            for (base, way), found in list(self._sums.items())
        ]


def way_of(together: Sequence[Chosen]) -> Way | None:
    """Returns how the models of one pass are served; None if whole models and adapters on another are mixed.

    A base counts as a merged model, as it computes the same.
    """
    weights = {chosen.weights.id for chosen in together}
    adapters = {chosen.adapter and chosen.adapter.id for chosen in together}
    if adapters == {None}:
        return "merged" if len(weights) == 1 else "many_merged"
    if len(weights) > 1:
        return None
    return "adapter" if len(adapters) == 1 else "many_adapters"
