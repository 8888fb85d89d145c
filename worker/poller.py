"""The loop in a worker's process that does one kind of work, one piece at a time."""

import threading
from collections.abc import Callable

from worker.outages import OUTAGES
from worker.supervisor.drain import Drain


class Poller:
    """Polls for work when it is woken and every `poll_seconds`, and works while it finds some.

    `look` does one piece of work and returns whether there may be more. Its thread lives as long as the process, which
    matters: Linux ends a trainer when the thread that spawned it ends.
    """

    def __init__(
        self,
        name: str,
        look: Callable[[], bool],
        *,
        poll_seconds: float,
        drain: Drain,
        on_call: bool = True,
        at_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_call` False: the work is due by the clock alone, and wake-ups are ignored. `at_stop`: called by `wait`
        after the last look, if the worker was stopped.
        """
        self.name, self.on_call, self._at_stop = name, on_call, at_stop
        self._look, self._poll_seconds, self._drain = look, poll_seconds, drain
        self._wanted, self._bell, self._busy = threading.Event(), threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"tunery-{name}", daemon=True)

    def open(self) -> None:
        """Starts polling in a thread, which needs no broker."""
        self._thread.start()

    def wake(self) -> None:
        """Makes the poller's own thread look now, if it is on call."""
        if self.on_call:
            self._bell.set()

    def work(self) -> None:
        """Works in the caller's thread until nothing is left; returns at once while another thread works."""
        # Set first: the thread that holds the lock looks once more before it releases it, so that no wake-up is lost
        # between its last look and the release.
        self._wanted.set()
        while self._wanted.is_set() and self._busy.acquire(blocking=False):
            try:
                self._wanted.clear()
                self._work_off()
            finally:
                self._busy.release()

    def wait(self) -> None:
        """Waits until no thread is working and keeps any from starting again: for a worker that stops."""
        self._busy.acquire()
        if self._drain.begun:  # else only this process ends, and Celery starts the next
            with OUTAGES.survived(f"the {self._thread.name} poller"):
                self._at_stop()

    def _run(self) -> None:
        while not self._drain.begun:
            self.work()
            self._bell.wait(self._poll_seconds)
            self._bell.clear()
        # Another thread may still work with a process that this one has started, and which would end with it.
        threading.Event().wait()

    def _work_off(self) -> None:
        with OUTAGES.survived(f"the {self._thread.name} poller"):
            while not self._drain.begun and self._look():
                pass
