"""What this host can train on, asked without torch: nvidia-smi where there is one, else the CPU."""

import logging
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tunery.jobs.model import Slot

log = logging.getLogger(__name__)

_FIELDS = "index,uuid,name,memory.total,compute_cap"
_BF16_SINCE = 8.0
"""Compute capability of the first GPUs (Ampere) that compute in bf16."""


@dataclass(frozen=True)
class Device:
    """A GPU (`index` as nvidia-smi and CUDA_DEVICE_ORDER=PCI_BUS_ID count them) or, with index None, the host's CPU."""

    index: int | None
    name: str
    memory_bytes: int
    bf16: bool = True
    uuid: str = ""


def host() -> str:
    """The name under which this machine's devices are counted."""
    return socket.gethostname()


def found(serve_gpu: int | None) -> list[Device]:
    """The devices that may train: every GPU that CUDA_VISIBLE_DEVICES leaves, less the model server's; else the CPU.

    A host whose only GPU serves offers nothing, rather than its CPU by surprise.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [gpu for gpu in _gpus() if _is_visible(gpu, visible)]
    if not gpus:
        return [Device(None, "CPU", _memory_bytes())]
    return [gpu for gpu in gpus if gpu.index != serve_gpu]


def free_of_strangers(devices: list[Device]) -> list[Device]:
    """The devices on which no process computes, ours or another's.

    Ours count too, and rightly: a GPU whose run has just been killed is offered again when it is really empty.
    """
    if all(device.index is None for device in devices):
        return devices
    busy = set(_ask("--query-compute-apps=gpu_uuid"))
    return [device for device in devices if device.uuid not in busy]


def as_slot(device: Device) -> Slot:
    """The row that shows the device."""
    where = "cpu" if device.index is None else f"gpu{device.index}"
    return Slot(
        id=f"{host()}/{where}",
        host=host(),
        gpu_index=device.index,
        device=device.name,
        memory_bytes=device.memory_bytes,
        bf16=device.bf16,
    )


def _gpus() -> list[Device]:
    rows = [[cell.strip() for cell in line.split(",")] for line in _ask(f"--query-gpu={_FIELDS}")]
    return [
        Device(int(index), name, int(float(mebibytes) * 2**20), float(capability) >= _BF16_SINCE, uuid)
        for index, uuid, name, mebibytes, capability in rows
    ]


def _ask(query: str) -> list[str]:
    """nvidia-smi's answer, a line a row; none without a driver. One that hangs (a GPU fell off the bus) is an error."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except FileNotFoundError:
        return []
    if answer.returncode != 0:
        log.error("nvidia-smi fails, so no GPU is used: %s", (answer.stdout + answer.stderr).strip())
        return []
    return [line for line in answer.stdout.splitlines() if line.strip()]


def _is_visible(gpu: Device, visible: str | None) -> bool:
    if visible is None or visible.strip() == "all":
        return True
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return any(name == str(gpu.index) or (name.startswith("GPU-") and gpu.uuid.startswith(name)) for name in names)


def _memory_bytes() -> int:
    """The host's memory, or the container's share of it."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return installed if text == "max" else min(installed, int(text))
