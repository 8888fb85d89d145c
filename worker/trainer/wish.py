"""The wish that a run stops, as SIGTERM brings it."""

import signal
from types import FrameType


class Stopped(Exception):
    """The run was asked to stop while it was not in the loop."""


class Wish:
    """Whether SIGTERM has come. The handler only notes it; the work looks when it can stop cleanly."""

    def __init__(self) -> None:
        self.stop = False

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.stop = True
