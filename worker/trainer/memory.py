"""The memory plan of a run: how a step is cut up so that it fits its device.

It is made before the first step (`preflight.py`) and never changed: where it turns out too large, `next_after` makes
the next one. A plan changes no gradient: a step's loss is one sum over its rows, however they are cut.
"""

from dataclasses import dataclass, replace

from worker.trainer.data import MicroBatch


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes in tokens, and what is kept in memory between the passes."""

    max_tokens: int  # of a micro-batch, padding included
    packed_tokens: int | None = None  # of a sequence into which rows are packed; None: a row a sequence
    recompute: bool = False  # the backward pass makes activations again instead of keeping them
    graphs: bool = False  # passes are recorded, and the recordings keep the memory that they use


def next_after(plan: MemoryPlan, parts: list[MicroBatch]) -> MemoryPlan | None:
    """Returns the plan to take after `plan` ran out of memory on `parts`; None where there is none.

    Half the tokens at once, down to one row; then one row with its activations made again.
    """
    if any(len(part) > 1 or len(part[0]) > 1 for part in parts):
        half = max(1, plan.max_tokens // 2)
        packed = None if plan.packed_tokens is None else min(plan.packed_tokens, half)
        return replace(plan, max_tokens=half, packed_tokens=packed, graphs=False)
    return None if plan.recompute else replace(plan, recompute=True, graphs=False)
