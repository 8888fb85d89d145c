"""The wish that a run stops, as SIGTERM brings it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """The run was asked to stop while it was not in the loop."""


class Wish:
    """Whether SIGTERM has come. The handler only notes it; the work looks when it can stop cleanly."""

    def __init__(self) -> None:
        self.stop = False
        self._breaks = False

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, self._note)

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Lets SIGTERM raise Stopped at once inside: for long work that can be begun again from nothing."""
        self._breaks = True
        try:
            self.check()
            yield
        finally:
            self._breaks = False

    def check(self) -> None:
        """Raises Stopped where SIGTERM has come."""
        if self.stop:
            raise Stopped

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.stop = True
        if self._breaks:
            raise Stopped
