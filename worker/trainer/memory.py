"""The memory plan of a run: how a step is cut up so that it fits its device.

It is made before the first step (`preflight.py`) and never changed: where it turns out too large, `smaller` makes the
next one. A plan changes no gradient: a step's loss is one sum over its rows, however they are cut.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes in tokens, and whether the backward pass makes activations again instead of keeping them."""

    max_tokens: int  # of a micro-batch, padding included
    packed_tokens: int | None = None  # of a sequence into which rows are packed; None: a row a sequence
    recompute: bool = False

    def smaller(self) -> "MemoryPlan":
        """Half the tokens at once. A packed sequence is no longer than a micro-batch."""
        half = max(1, self.max_tokens // 2)
        packed = None if self.packed_tokens is None else min(self.packed_tokens, half)
        return replace(self, max_tokens=half, packed_tokens=packed)
