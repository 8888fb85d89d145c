"""A run records the hardware of its machine."""

from pathlib import Path

import pytest
import torch

from worker.trainer import hardware


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 24\nGCC version: 12\n", "570.86.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
        ("something else\n", None),
    ],
)
def test_driver_is_read_from_the_kernels_words(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert hardware.read_driver(tmp_path / "version") == version
    assert hardware.read_driver(tmp_path / "absent") is None


def test_cpu_is_described_by_what_changes_its_sums() -> None:
    described = hardware.describe(torch.device("cpu"), 1)
    assert (described["device"], described["count"], described["threads"]) == ("cpu", 1, torch.get_num_threads())
    assert described["instructions"] == torch.backends.cpu.get_cpu_capability()


@pytest.mark.gpu
def test_gpu_is_described_by_driver_and_libraries() -> None:
    described = hardware.describe(torch.device("cuda"), 2)
    assert described["device"] == torch.cuda.get_device_name()
    assert described["count"] == 2
    assert all(described[name] for name in ("cuda", "cudnn", "capability"))
    assert described["driver"] is None or described["driver"][0].isdigit()  # a container may hide it
