"""Descriptions of how a process of the service ended."""

import signal

import pytest

from tunery import processes


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exited with status 0"),
        (3, "exited with status 3"),
        (-signal.SIGTERM, "was killed by signal 15"),
        (-signal.SIGKILL, "was killed by signal 9 (the host may have run out of memory)"),
    ],
)
def test_an_end_is_a_status_or_a_signal(status: int, words: str) -> None:
    assert processes.ending(status) == words
