"""Ends a stack whose owner was killed: `python -m tunery.local.watchdog MARK`, with a pipe from the owner as its input.

The pipe closes whenever the owner ends. If the owner stopped everything itself, nothing is left to do. After a SIGKILL
of the owner, services get a SIGTERM, and what is left after a grace period is killed: every process with
TUNERY_STACK=MARK in its environment, which includes those that services started in their own sessions (a trainer).
PDEATHSIG reaches only children, and exists only on Linux.
"""

import signal
import sys

from tunery import processes

MARK = "TUNERY_STACK"


def end(mark: str, *, grace: float) -> None:
    """Sends SIGTERM to all, and SIGKILL after `grace` seconds to those that remain, until none is left."""
    processes.signal_all(processes.marked(MARK, mark), signal.SIGTERM)
    processes.wait_until(lambda: not processes.marked(MARK, mark), seconds=grace, alive=lambda: True, every=0.2)
    processes.kill_marked(MARK, mark)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end(sys.argv[1], grace=30)
