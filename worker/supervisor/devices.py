"""What this host can train on, asked without torch: nvidia-smi where there is one, else the CPU."""

import logging
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tunery.jobs.model import HostDevice

log = logging.getLogger(__name__)

_FIELDS = "index,uuid,name,memory.total,compute_cap,mig.mode.current"
_NO_GPU = ("", "-1", "none", "void", "NoDevFiles")
"""Ways to say in CUDA_VISIBLE_DEVICES that the GPUs are not meant."""
_ADVICE = "Mend the driver, or set CUDA_VISIBLE_DEVICES to nothing to train on the CPU."
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


class DriverFails(Exception):
    """What runs on this host's GPUs, or whether it has any, cannot be known now."""


def host() -> str:
    """The name under which this machine's devices are counted."""
    return socket.gethostname()


def found(serve_gpu: int | None) -> list[Device]:
    """The devices that may train: every GPU that CUDA_VISIBLE_DEVICES leaves, less the model server's; else the CPU.

    A host with GPUs of which none may be used offers nothing, rather than its CPU by surprise. Raises DriverFails.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    rows = _ask(f"--query-gpu={_FIELDS}") if visible not in _NO_GPU else []
    if not rows:
        return [Device(None, "CPU", _memory_bytes())]
    gpus = [gpu for row in rows if (gpu := _understood(row)) is not None]
    offered = [gpu for gpu in gpus if _is_visible(gpu, visible) and gpu.index != serve_gpu]
    if not offered:
        log.error("none of this host's %d GPUs may train: CUDA_VISIBLE_DEVICES is '%s'", len(rows), visible)
    return offered


def free_of_strangers(devices: list[Device]) -> list[Device]:
    """The devices on which no process computes, ours or another's. Raises DriverFails.

    Ours count too, and rightly: a GPU whose run has just been killed is offered again when it is really empty.
    """
    if all(device.index is None for device in devices):
        return devices
    busy = set(_ask("--query-compute-apps=gpu_uuid"))
    return [device for device in devices if device.uuid not in busy]


def as_row(device: Device) -> HostDevice:
    """The row that shows the device."""
    where = "cpu" if device.index is None else f"gpu{device.index}"
    return HostDevice(
        id=f"{host()}/{where}",
        host=host(),
        gpu_index=device.index,
        device=device.name,
        memory_bytes=device.memory_bytes,
        bf16=device.bf16,
    )


def _understood(row: str) -> Device | None:
    """A line of nvidia-smi's; None for a GPU that no run could use as a whole, or whose memory is not told."""
    index, uuid, name, mebibytes, capability, mig = (cell.strip() for cell in row.split(","))
    if mig == "Enabled" or not mebibytes.isdigit():
        why = "it is divided by MIG" if mig == "Enabled" else "its driver does not tell its memory"
        log.error("GPU %s (%s) is not used: %s", index, name, why)
        return None
    return Device(int(index), name, int(mebibytes) * 2**20, float(capability) >= _BF16_SINCE, uuid)


def _ask(query: str) -> list[str]:
    """nvidia-smi's answer, a line a row; none on a host without that program, and only there. Raises DriverFails."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return []
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DriverFails(f"nvidia-smi does not answer ({type(error).__name__}). {_ADVICE}") from error
    if answer.returncode != 0:
        said = (answer.stdout + answer.stderr).strip()
        raise DriverFails(f"nvidia-smi ends with {answer.returncode} ({said}). {_ADVICE}")
    return [line for line in answer.stdout.splitlines() if line.strip()]


def _is_visible(gpu: Device, visible: str) -> bool:
    if visible == "all":
        return True
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return any(name == str(gpu.index) or (name.startswith("GPU-") and gpu.uuid.startswith(name)) for name in names)


def _memory_bytes() -> int:
    """The host's memory, or the container's share of it."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return installed if text == "max" else min(installed, int(text))
