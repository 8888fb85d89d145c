"""Handles SIGTERM as the request to stop a run."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """The run was asked to stop outside the training loop."""


class StopSignal:
    """Records SIGTERM. The handler only sets a flag; the run reads it where it can stop cleanly."""

    def __init__(self) -> None:
        self.received = False
        self._breaks = False

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, self._note)

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Makes SIGTERM raise Stopped at once inside the block: for long work that can be repeated from the start."""
        self._breaks = True
        try:
            self.check()
            yield
        finally:
            self._breaks = False

    def check(self) -> None:
        """Raises Stopped after SIGTERM."""
        if self.received:
            raise Stopped

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True
        if self._breaks:
            raise Stopped
