"""Whether a model keeps packed rows apart: several rows in one sequence, each seeing only itself."""

from collections.abc import Hashable, Sequence

import torch

from worker.trainer import rope
from worker.trainer.data import Row, collate, singles
from worker.trainer.objective import Objective

_TRIED = 10_000
"""Rows among which a pair is sought: the first ones."""


def _pair(objective: Objective, rows: Sequence[Row]) -> list[Row]:
    """Returns two rows that could share a sequence, of most unlike length; fewer where none can.

    Rows of nearly the same length would not be laid behind each other.
    """
    lengths = rope.of(objective.causal)
    together: dict[Hashable, list[Row]] = {}
    for row in sorted(rows[:_TRIED], key=len):
        together.setdefault(lengths.group(len(row)), []).append(row)
    found = next((group for group in together.values() if len(group) > 1), [])
    return [found[0], found[-1]] if found else []


def keeps_rows_apart(objective: Objective, rows: Sequence[Row], device: torch.device) -> bool:
    """Whether this model's loss of two rows in one sequence is the sum of their losses, by trying it.

    Asking the model's class would not do: state-space and convolution layers mix neighbours without any attention, and
    attention kernels differ in which masks they honour. Rows that see each other differ in the first digits.
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
