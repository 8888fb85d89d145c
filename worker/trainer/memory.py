"""The memory plan of a run: how a step is split so that it fits its device.

It is made before the first step (`preflight.py`) and never changed: if it proves too large, `next_after` returns the
next one. A plan does not change gradients: a step's loss is one sum over its rows, however they are split.
"""

from dataclasses import dataclass, replace

from worker.trainer.data import MicroBatch


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes in tokens, and what is kept in memory between passes."""

    max_tokens: int  # of a micro-batch, including padding
    packed_tokens: int | None = None  # of a sequence into which rows are packed; None: one row per sequence
    recompute: bool = False  # the backward pass recomputes activations instead of keeping them
    graphs: bool = False  # passes are recorded, and the graphs keep the memory that they use


def next_after(plan: MemoryPlan, parts: list[MicroBatch]) -> MemoryPlan | None:
    """Returns the plan to use after `plan` ran out of memory on `parts`; None if there is none left.

    It halves the tokens, down to one row; then it recomputes activations.
    """
    if any(len(part) > 1 or len(part[0]) > 1 for part in parts):
        half = max(1, plan.max_tokens // 2)
        packed = None if plan.packed_tokens is None else min(plan.packed_tokens, half)
        return replace(plan, max_tokens=half, packed_tokens=packed, graphs=False)
    return None if plan.recompute else replace(plan, recompute=True, graphs=False)
