"""The host memory of a process, as Linux counts it."""

from pathlib import Path


def host_bytes(counter: str = "VmHWM", pid: int | str = "self") -> int:
    """Returns a process's host memory in bytes: its peak (`VmHWM`) or its present size (`VmRSS`); 0 once it has ended.

    Not getrusage's peak, which a process inherits from the one that started it.
    """
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{counter}:")), 0)
