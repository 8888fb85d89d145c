"""How much memory there is for models."""

import torch

from worker.supervisor.devices import memory_bytes


def of(device: str) -> int:
    """Returns the bytes of a device's memory, those of the host for "cpu"."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_bytes()
