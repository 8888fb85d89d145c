"""The flag by which a worker's processes stop taking work."""

import mmap


class Drain:
    """A flag that the main process sets and its forked children read.

    One byte of shared memory instead of a multiprocessing.Event, which holds a lock while it is read: a child killed at
    that moment would leave the main process waiting for the lock inside its signal handler.
    """

    def __init__(self) -> None:
        self._flag = mmap.mmap(-1, 1)

    def begin(self) -> None:
        """Stops claiming work permanently; runs save a snapshot and end."""
        self._flag[0] = 1

    @property
    def begun(self) -> bool:
        return self._flag[0] == 1
