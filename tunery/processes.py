"""Processes: children that end with their parent, in their own groups; processes found by a mark; locks; ports."""

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 8192
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def dies_with_parent(death_signal: int) -> Callable[[], None] | None:
    """A `preexec_fn` that asks Linux to send the child `death_signal` when the spawning thread ends; None elsewhere.

    The thread counts, not the process: spawn from the main thread. A change of user clears the setting, but
    `subprocess` changes users before it calls this.
    """
    if _LIBC is None:
        return None
    prctl = _LIBC.prctl  # looked up here: between fork and exec nothing may take a lock
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:  # the parent ended before the setting was made
            os.kill(os.getpid(), death_signal)

    return ask


def spawn(
    command: Sequence[str | Path],
    *,
    output: IO[bytes] | int,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    user: int | None = None,
    death_signal: int = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Starts `command` in its own session, so that Ctrl-C reaches only this process; both outputs go to `output`."""
    return subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=env,
        start_new_session=True,
        user=user,
        group=user,
        extra_groups=[] if user is not None else None,
        preexec_fn=dies_with_parent(death_signal),
    )


def stop(process: subprocess.Popen[bytes], *steps: tuple[int, float]) -> int:
    """Sends each step's signal and waits its seconds, then sends SIGKILL to the process's group.

    Returns the exit status. The group is killed even if the process ended by itself, as its children may remain.
    """
    for number, seconds in steps:
        if process.poll() is not None:
            break
        process.send_signal(number)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def is_alive(pid: int) -> bool:
    """Whether the process runs. `kill(pid, 0)` is not used, as it succeeds for zombies, which may never be reaped."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def marked(name: str, value: str) -> list["psutil.Process"]:
    """Returns the other running processes that have the variable in their environment.

    A recorded pid may belong to another process by now and does not cover children; a mark is inherited.
    """
    import psutil

    return [other for other in psutil.process_iter() if other.pid != os.getpid() and _has(other, name, value)]


def _has(other: "psutil.Process", name: str, value: str) -> bool:
    import psutil

    try:
        return bool(other.environ().get(name) == value and other.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:  # another user's, or gone
        return False


def signal_all(others: "Sequence[psutil.Process]", number: int) -> None:
    """Sends a signal to each process that still exists."""
    import psutil

    for other in others:
        with suppress(psutil.Error):
            other.send_signal(number)


def kill_marked(name: str, value: str) -> int:
    """Sends SIGKILL until no marked process is left, and returns how many there were.

    Repeated, because a process may start another before the signal arrives.
    """
    import psutil

    killed = set()
    while found := marked(name, value):
        killed |= {other.pid for other in found}
        signal_all(found, signal.SIGKILL)
        psutil.wait_procs(found, timeout=1)
    return len(killed)


def lock(file: IO[str] | int, *, shared: bool = False) -> bool:
    """Takes the kernel's lock on an open file without waiting; returns False if another process has it.

    The lock ends when the file is closed or its process ends for any reason.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def return_memory() -> None:
    """Returns freed memory, which glibc would keep for reuse, to the system."""
    with suppress(AttributeError):  # another C library
        getattr(_LIBC, "malloc_trim")(0)  # noqa: B009  ctypes looks it up


def free_port() -> int:
    """Returns a port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(ready: Callable[[], bool], *, seconds: float, alive: Callable[[], bool], every: float = 0.05) -> bool:
    """Polls until `ready` holds and returns True; returns False if `alive` no longer holds or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if ready():
            return True
        if not alive():
            return False
        time.sleep(every)
    return False


def ending(status: int) -> str:
    """Returns what an exit status means: "exited with status 3", or the signal that killed the process."""
    if status >= 0:
        return f"exited with status {status}"
    cause = " (the host may have run out of memory)" if status == -signal.SIGKILL else ""
    return f"was killed by signal {-status}{cause}"


def tail(path: Path, lines: int = 15) -> str:
    """Returns the last lines of a log (of its last 8 KiB), for an error's text; empty when there is none.

    Without NULs, as the text may be stored in PostgreSQL. Of a line that is overwritten repeatedly, as by a progress
    bar, only the last state remains.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace").replace("\0", "\ufffd")
    except OSError:
        return ""
    shown = (line.rstrip("\r").rpartition("\r")[2] for line in text.strip().split("\n"))
    return "\n".join(list(shown)[-lines:])
