"""Whether a model keeps packed rows apart: several rows in one sequence, each seeing only itself."""

import torch

from worker.trainer.data import Row, collate
from worker.trainer.objective import Objective


def keeps_rows_apart(objective: Objective, rows: list[Row], device: torch.device) -> bool:
    """Whether this model's loss of two rows in one sequence is the sum of their losses, by trying it.

    Asking the model's class would not do: state-space and convolution layers mix neighbours without any attention, and
    attention kernels differ in which masks they honour. Rows that see each other differ in the first digits.
    """
    if len(rows) < 2:
        return True
    # Of most unlike length: rows of nearly the same one would not be laid behind each other.
    pair = [min(rows, key=len), max(rows, key=len)]
    told = objective.knows_borders
    with torch.no_grad():
        alone = sum(float(objective(collate(pair, [[i]], device, borders=told), 1.0)[0]) for i in range(2))
        packed = float(objective(collate(pair, [[0, 1]], device, borders=told), 1.0)[0])
        swapped = float(objective(collate(pair, [[1, 0]], device, borders=told), 1.0)[0])
    tolerance = 2e-2 if device.type == "cuda" else 1e-4
    return all(abs(value - alone) <= tolerance * abs(alone) for value in (packed, swapped))
