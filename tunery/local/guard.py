"""Ends a stack whose owner was killed: `python -m tunery.local.guard MARK`, with a pipe from the owner as its input.

The pipe closes when the owner ends, however it ends. An owner that stopped everything itself left nothing to do. After
a SIGKILL the services are told to end, and what is still there after a while is killed: every process with
TUNERY_STACK=MARK in its environment, which also finds what services started in sessions of their own (a trainer).
PDEATHSIG alone reaches children only, and on Linux only.
"""

import os
import signal
import sys

import psutil

from tunery.local import process

MARK = "TUNERY_STACK"


def marked(mark: str) -> list[psutil.Process]:
    """All living processes of the stack, this one apart."""
    return [other for other in psutil.process_iter() if other.pid != os.getpid() and _has(other, mark)]


def _has(other: psutil.Process, mark: str) -> bool:
    try:
        return other.environ().get(MARK) == mark and other.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:  # another user's, or gone
        return False


def _tell(others: list[psutil.Process], number: int) -> None:
    for other in others:
        try:
            other.send_signal(number)
        except psutil.Error:
            continue


def end(mark: str, *, grace: float) -> None:
    """SIGTERM to all, SIGKILL after `grace` seconds to whoever stayed, until none is left."""
    _tell(marked(mark), signal.SIGTERM)
    process.wait_until(lambda: not marked(mark), seconds=grace, alive=lambda: True, every=0.2)
    kill(mark)


def kill(mark: str) -> None:
    """SIGKILL until none is left: between a look and the signal a service may have started another."""
    while found := marked(mark):
        _tell(found, signal.SIGKILL)
        psutil.wait_procs(found, timeout=1)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end(sys.argv[1], grace=30)
