"""Ctrl-C, `kill` and a closed terminal are one thing: stop, tidy up, leave."""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import NoReturn

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def ends_on_signals() -> AbstractContextManager[None]:
    """SIGTERM and SIGHUP become what Ctrl-C is: a KeyboardInterrupt. For the main thread."""
    return _handled_by(_interrupt)


def undisturbed() -> AbstractContextManager[None]:
    """While things are being stopped, a second Ctrl-C must not leave half of them running."""
    return _handled_by(signal.SIG_IGN)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], NoReturn] | signal.Handlers) -> Iterator[None]:
    """What was ignored stays so: `nohup` wants to outlive its terminal, and a script's `&` that terminal's Ctrl-C."""
    before = {number: signal.getsignal(number) for number in _STOPS}
    heard = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in heard.items():
            signal.signal(number, old)
