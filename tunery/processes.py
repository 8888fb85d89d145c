"""Processes: children that end with their parent, in groups of their own; others found by a mark; locks; free ports."""

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

    It is the thread, not the process, that counts: spawn from the main thread. A change of user clears the setting, and
    `subprocess` changes users before it calls this, so the order is right.
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
    """Start `command` in a session of its own (a terminal's Ctrl-C must reach us alone), both outputs to `output`."""
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
    """Signal the process, wait, signal harder; each step is (signal, seconds to wait). SIGKILL to its group ends it.

    Returns the exit status. The group is killed even when the process left by itself: its children may have stayed.
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
    """Whether the process runs. `kill(pid, 0)` would call a zombie alive, and where nobody reaps they stay."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def marked(name: str, value: str) -> list["psutil.Process"]:
    """Returns the living processes that have the variable in their environment, this one apart.

    A pid that was written down may be another's by now, and knows no children; a mark is inherited.
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
    """Sends a signal to each process that is still there."""
    import psutil

    for other in others:
        with suppress(psutil.Error):
            other.send_signal(number)


def kill_marked(name: str, value: str) -> int:
    """Sends SIGKILL until no marked process is left, and returns how many there were.

    Again and again: between a look and the signal a process may have started another.
    """
    import psutil

    killed = set()
    while found := marked(name, value):
        killed |= {other.pid for other in found}
        signal_all(found, signal.SIGKILL)
        psutil.wait_procs(found, timeout=1)
    return len(killed)


def lock(file: IO[str] | int, *, shared: bool = False) -> bool:
    """Takes the kernel's lock of an open file; returns False when another process has it. Does not wait.

    The lock ends when the file is closed or its process ends, however it ends.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def return_memory() -> None:
    """Returns freed memory to the system, which glibc keeps for this process to ask for again."""
    with suppress(AttributeError):  # another C library
        getattr(_LIBC, "malloc_trim")(0)  # noqa: B009  ctypes looks it up


def free_port() -> int:
    """Returns a port of 127.0.0.1 that nobody held a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(ready: Callable[[], bool], *, seconds: float, alive: Callable[[], bool], every: float = 0.05) -> bool:
    """Poll `ready` until it holds (True), or `alive` does not, or the time is over (False)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if ready():
            return True
        if not alive():
            return False
        time.sleep(every)
    return False


def tail(path: Path, lines: int = 15) -> str:
    """Returns the last lines of a log (of its last 8 KiB), for an error's text; empty when there is none.

    No NUL is among them: the text may be kept in a database, and PostgreSQL takes none. Of a line that was written
    over again and again, as a progress bar is, the last state is left.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace").replace("\0", "\ufffd")
    except OSError:
        return ""
    shown = (line.rstrip("\r").rpartition("\r")[2] for line in text.strip().split("\n"))
    return "\n".join(list(shown)[-lines:])
