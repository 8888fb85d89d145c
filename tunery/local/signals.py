"""Ctrl-C, `kill` and a closed terminal are one thing: stop, tidy up, leave."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def ends_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP become what Ctrl-C is: a KeyboardInterrupt. For the main thread."""
    before = [signal.signal(number, _interrupt) for number in _STOPS]
    try:
        yield
    finally:
        for number, handler in zip(_STOPS, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """While things are being stopped, a second Ctrl-C must not leave half of them running."""
    before = [signal.signal(number, signal.SIG_IGN) for number in _STOPS]
    try:
        yield
    finally:
        for number, handler in zip(_STOPS, before, strict=True):
            signal.signal(number, handler)
