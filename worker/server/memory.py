"""Reads how much memory a device has for models."""

import torch

from worker.supervisor.devices import memory_bytes


def of(device: str) -> int:
    """Returns a device's memory in bytes, the host's for "cpu"."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_bytes()
