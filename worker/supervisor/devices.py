"""Finds this host's devices that can train, without torch: the NVIDIA driver's GPUs, or the CPU without a driver."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from tunery.jobs.model import HostDevice

log = logging.getLogger(__name__)

_NO_GPU = ("", "-1", "none", "void", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs."""
_ADVICE = "Repair the driver, or set CUDA_VISIBLE_DEVICES to an empty value to train on the CPU."
_BF16_SINCE = (8, 0)
"""Compute capability of the first GPUs (Ampere) that compute in bf16."""


@dataclass(frozen=True)
class Device:
    """A GPU (`index` as the driver and CUDA_DEVICE_ORDER=PCI_BUS_ID count them) or, with index None, the host's CPU."""

    index: int | None
    name: str
    memory_bytes: int
    bf16: bool = True
    uuid: str = ""


class DriverFails(Exception):
    """What runs on this host's GPUs, or whether it has any, cannot be known now."""


def host() -> str:
    """Returns this machine's name in the table of devices."""
    return socket.gethostname()


def found(*reserved: int | None) -> list[Device]:
    """Returns the devices that may train: the GPUs visible by CUDA_VISIBLE_DEVICES, without the reserved ones; else
    the CPU. A host with GPUs of which none may be used offers nothing, so that no job runs on its CPU unexpectedly.

    Raises DriverFails.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    gpus = _gpus() if visible not in _NO_GPU else []
    if not gpus:
        return [Device(None, "CPU", memory_bytes())]
    usable = [gpu for gpu in gpus if gpu is not None and gpu.index not in reserved]
    offered = [gpu for gpu in usable if _is_visible(gpu, visible)]
    if not offered:
        log.error("none of this host's %d GPUs is used for training: CUDA_VISIBLE_DEVICES is '%s'", len(gpus), visible)
    return offered


def idle_devices(devices: list[Device]) -> list[Device]:
    """Returns the devices on which no process computes. Raises DriverFails.

    Tunery's own processes count too: a GPU whose run was just killed is offered again once it is empty.
    """
    if all(device.index is None for device in devices):
        return devices
    with _driver() as is_there:
        if not is_there:  # it was there when the devices were found
            raise DriverFails(f"the NVIDIA driver's library is missing. {_ADVICE}")
        return [device for device in devices if device.index is None or not _is_busy(device.index)]


def as_row(device: Device) -> HostDevice:
    """Returns the database row of the device."""
    where = "cpu" if device.index is None else f"gpu{device.index}"
    return HostDevice(
        id=f"{host()}/{where}",
        host=host(),
        gpu_index=device.index,
        device=device.name,
        memory_bytes=device.memory_bytes,
        bf16=device.bf16,
    )


@contextmanager
def _driver() -> Iterator[bool]:
    """Yields whether the NVIDIA driver is there for the block to query: False only if the host lacks its library.

    Raises DriverFails, also for the driver's errors inside the block.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        yield False
        return
    except pynvml.NVMLError as error:
        raise _failure(error) from error
    try:
        yield True
    except pynvml.NVMLError as error:
        raise _failure(error) from error
    finally:
        # A driver that has failed may refuse this too; its first error has been raised already.
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _failure(error: Exception) -> DriverFails:
    return DriverFails(f"the NVIDIA driver fails ({error}). {_ADVICE}")


def _gpus() -> list[Device | None]:
    """Returns the GPUs in the driver's order; None for each that no run could use as a whole. Raises DriverFails."""
    with _driver() as is_there:
        return [_understood(index) for index in range(pynvml.nvmlDeviceGetCount())] if is_there else []


def _understood(index: int) -> Device | None:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = pynvml.nvmlDeviceGetName(handle)
    mig = _if_known(pynvml.nvmlDeviceGetMigMode, handle)
    memory = _if_known(pynvml.nvmlDeviceGetMemoryInfo, handle)
    is_divided = mig is not None and mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    if is_divided or memory is None:
        why = "it is partitioned by MIG" if is_divided else "its driver does not report its memory"
        log.error("GPU %s (%s) is not used: %s", index, name, why)
        return None
    bf16 = pynvml.nvmlDeviceGetCudaComputeCapability(handle) >= _BF16_SINCE
    return Device(index, name, int(memory.total), bf16, pynvml.nvmlDeviceGetUUID(handle))


def _is_busy(index: int) -> bool:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return bool(_if_known(pynvml.nvmlDeviceGetComputeRunningProcesses, handle))


def _if_known(ask: Callable[[Any], Any], handle: Any) -> Any:
    """Returns the driver's answer; None if this kind of GPU does not support the query, which is no failure."""
    try:
        return ask(handle)
    except pynvml.NVMLError_NotSupported:
        return None


def _is_visible(gpu: Device, visible: str) -> bool:
    if visible == "all":
        return True
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return any(name == str(gpu.index) or (name.startswith("GPU-") and gpu.uuid.startswith(name)) for name in names)


def memory_bytes() -> int:
    """Returns the host's memory, or the container's limit if that is lower."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return installed if text == "max" else min(installed, int(text))
