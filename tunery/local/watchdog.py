"""Ends a stack whose owner was killed: `python -m tunery.local.watchdog MARK`, with a pipe from the owner as its input.

The pipe closes when the owner ends, however it ends. An owner that stopped everything itself left nothing to do. After
a SIGKILL the services get a SIGTERM, and what is still there after a while is killed: every process with
TUNERY_STACK=MARK in its environment, which also finds what services started in sessions of their own (a trainer).
PDEATHSIG alone reaches children only, and on Linux only.
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
