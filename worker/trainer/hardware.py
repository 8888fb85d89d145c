"""What a run computed on, for `training_config.json`: equal bits are to be expected on equal hardware alone."""

import platform
import re
from pathlib import Path
from typing import Any

import torch

_DRIVER = Path("/proc/driver/nvidia/version")
"""The NVIDIA kernel module's own words. Why not its library: the trainer needs no package for a file."""
_CPU = Path("/proc/cpuinfo")


def describe(device: torch.device, ranks: int) -> dict[str, Any]:
    """Returns the device's name, how many took part, and what stands between them and the numbers."""
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
    """Returns the GPU's own name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def read_driver(path: Path) -> str | None:
    """Returns the version of the NVIDIA driver; None where the kernel does not say."""
    return _found(r"Kernel Module(?: for \S+)?\s+([\d.]+)", path)


def _found(pattern: str, path: Path) -> str | None:
    try:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None
