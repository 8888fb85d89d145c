"""What a run has: its hardware for `training_config.json`, as equal bits can be expected on equal hardware only, and a
GPU's free memory.
"""

import platform
import re
from pathlib import Path
from typing import Any

import torch

_DRIVER = Path("/proc/driver/nvidia/version")
"""The NVIDIA kernel module's version file. Why not the driver's library: reading a file needs no package."""
_CPU = Path("/proc/cpuinfo")


def describe(device: torch.device, ranks: int) -> dict[str, Any]:
    """Returns the device's name, the number of devices, and the versions that can affect results."""
    described: dict[str, Any] = {"device": device_name(device), "count": ranks, "machine": platform.machine()}
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return described | {
            "capability": ".".join(map(str, capability)),
            "driver": read_driver(_DRIVER),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return described | {
        "cpu": _found(r"^model name\s*: (.+)$", _CPU),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def device_name(device: torch.device) -> str:
    """Returns the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def read_driver(path: Path) -> str | None:
    """Returns the NVIDIA driver's version; None if the kernel does not provide it."""
    return _found(r"Kernel Module(?: for \S+)?\s+([\d.]+)", path)


def _found(pattern: str, path: Path) -> str | None:
    try:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None


def free_bytes(device: torch.device) -> int:
    """Returns the bytes of a GPU that new tensors can take: what the driver has, and what torch has reserved and not
    used. Not what recorded passes have reserved, which only they use.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = [each for each in torch.cuda.memory_snapshot() if each["device"] == index]
    unused = sum(each["total_size"] - each["allocated_size"] for each in segments if each["segment_pool_id"] == (0, 0))
    return int(torch.cuda.mem_get_info(device)[0] + unused)
