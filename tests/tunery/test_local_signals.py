"""Which signals end `tunery up` and which do not, with real signals to this process."""

import signal
from collections.abc import Iterator

import pytest

from tunery.local.signals import ends_on_signals, undisturbed

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    before = [signal.signal(number, signal.SIG_DFL) for number in STOPS]
    yield
    for number, handler in zip(STOPS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPS)
def test_each_is_a_ctrl_c_and_afterwards_what_it_was(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), ends_on_signals():
        signal.raise_signal(number)
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_stays_so(ignored: signal.Signals) -> None:
    """`nohup make up &` starts with SIGHUP ignored, and `make up &` in a script with SIGINT ignored."""
    signal.signal(ignored, signal.SIG_IGN)
    with ends_on_signals():
        signal.raise_signal(ignored)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(ignored) is signal.SIG_IGN


def test_a_second_ctrl_c_does_not_disturb_the_stopping() -> None:
    with ends_on_signals():
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
