"""Handles Ctrl-C, `kill` and a closed terminal alike: each stops the stack in order."""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import NoReturn

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def ends_on_signals() -> AbstractContextManager[None]:
    """Makes SIGTERM and SIGHUP raise KeyboardInterrupt like Ctrl-C. Main thread only."""
    return _handled_by(_interrupt)


def undisturbed() -> AbstractContextManager[None]:
    """Ignores these signals in the block: a second Ctrl-C must not leave some services running."""
    return _handled_by(signal.SIG_IGN)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], NoReturn] | signal.Handlers) -> Iterator[None]:
    """Sets the handler, except for ignored signals, so that `nohup` and a script's `&` keep working."""
    before = {number: signal.getsignal(number) for number in _STOPS}
    heard = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in heard.items():
            signal.signal(number, old)
