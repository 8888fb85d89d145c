"""Several rows in one sequence, each seeing only itself."""

from bisect import bisect_left, insort

import torch

from worker.trainer.data import Row, Unit, collate
from worker.trainer.objective import Objective


def pack(lengths: list[int], capacity: int) -> list[Unit]:
    """Best-fit decreasing: each row goes into the fullest sequence that still has room for it.

    Sequences hold at most `capacity` tokens (a longer row stands alone). At most 11/9 of the fewest possible, plus 4
    (Johnson 1974); in practice within a few per cent. Why not in the file's order: leftovers would be padding.
    """
    units: list[Unit] = []
    rooms: list[tuple[int, int]] = []  # (tokens free, unit), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect_left(rooms, (lengths[i], -1))
        room, unit = rooms.pop(found) if found < len(rooms) else (capacity, len(units))
        if unit == len(units):
            units.append([])
        units[unit].append(i)
        if room > lengths[i]:
            insort(rooms, (room - lengths[i], unit))
    return units


def keeps_rows_apart(objective: Objective, rows: list[Row], device: torch.device) -> bool:
    """Whether this model's loss of two rows in one sequence is the sum of their losses, by trying it.

    Asking the model's class would not do: state-space and convolution layers mix neighbours without any attention, and
    attention kernels differ in which masks they honour. Rows that see each other differ in the first digits.
    """
    pair = sorted(rows, key=len)[:2]
    if len(pair) < 2:
        return True
    with torch.no_grad():
        alone = sum(float(objective(collate(pair, [[i]], device), 1.0)[0]) for i in range(2))
        packed = float(objective(collate(pair, [[0, 1]], device), 1.0)[0])
        swapped = float(objective(collate(pair, [[1, 0]], device), 1.0)[0])
    tolerance = 2e-2 if device.type == "cuda" else 1e-4
    return all(abs(value - alone) <= tolerance * abs(alone) for value in (packed, swapped))
