"""Tests whether a model keeps packed rows apart: several rows in one sequence, each of which sees only itself."""

from collections.abc import Hashable, Sequence

import torch

from worker.trainer import rope
from worker.trainer.data import Row, collate, singles
from worker.trainer.objective import Objective

_TRIED = 10_000
"""How many of the first rows are searched for a pair."""


def _pair(objective: Objective, rows: Sequence[Row]) -> list[Row]:
    """Returns two rows that could share a sequence, of very different lengths; fewer if none can.

    Rows of nearly equal length would not be concatenated.
    """
    lengths = rope.of(objective.causal)
    together: dict[Hashable, list[Row]] = {}
    for row in sorted(rows[:_TRIED], key=len):
        together.setdefault(lengths.group(len(row)), []).append(row)
    found = next((group for group in together.values() if len(group) > 1), [])
    return [found[0], found[-1]] if found else []


def keeps_rows_apart(objective: Objective, rows: Sequence[Row], device: torch.device) -> bool:
    """Tries whether this model's loss on two rows in one sequence is the sum of their losses.

    The model's class does not tell: state-space and convolution layers mix neighbours without attention, and attention
    kernels differ in which masks they respect. If rows see each other, the first digits differ.
    """
    pair = singles(_pair(objective, rows))
    if len(pair) < 2:
        return True  # no two rows are ever packed
    borders = objective.knows_borders
    with torch.no_grad():
        alone = sum(float(objective(collate(pair, [[i]], device, borders=borders), 1.0)[0]) for i in range(2))
        packed = float(objective(collate(pair, [[0, 1]], device, borders=borders), 1.0)[0])
        swapped = float(objective(collate(pair, [[1, 0]], device, borders=borders), 1.0)[0])
    tolerance = 2e-2 if device.type == "cuda" else 1e-4
    return all(abs(value - alone) <= tolerance * abs(alone) for value in (packed, swapped))
