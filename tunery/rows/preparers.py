"""Processes that each prepare a group of a large file's rows: what takes long of a row keeps one core busy at a time.

A process is Python with this one's path and nothing of its memory. It is given a function and then groups, and gives
back what the function makes of them, all of it pickled: both ends are ours. Chat templates, which are not, run in
processes of their own (`sandbox`), one for each of these. What a process cannot do is done here instead, so a fault
has the same words, and a process that ends early costs no more than time.
"""

import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, Self, TypeVar

from tunery.failures import InvalidTrainingFile

G = TypeVar("G")
T = TypeVar("T")

ROWS = 128
"""Rows of a group: fewer cost more exchanges."""
MOST = 4
"""A process and its renderer hold some 150 MiB."""
_AHEAD = 2
"""Groups for each process that are read while others are at work: memory must not grow with the file."""
_START = "import sys; sys.path[:] = sys.argv.pop().split('\\n'); from tunery.rows.preparers import main; main()"


def _cores() -> int:
    """Returns the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


COUNT = min(_cores(), MOST)


class Preparers(Generic[G, T]):
    """Up to `count` processes, which are started with the first group and end with the block that uses them."""

    def __init__(self, work: Callable[[G], T], count: int) -> None:
        """`work`: what is done with a group. Where it cannot be pickled, or `count` is 1, it is done here."""
        self._work = work
        settings = _pickled(work) if count > 1 else None
        self._all = [] if settings is None else [_Process(settings) for _ in range(count)]
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for process in self._all:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(max(1, len(self._all)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.kill()  # so that no thread waits for its answer
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.end()

    def map(self, groups: Iterator[G]) -> Iterator[T]:
        """What is made of each group, in order. Raises what `groups` raises, after the results of those before it."""
        if not self._all:
            yield from map(self._work, groups)
            return
        pending: deque[tuple[G, Future[bytes | None]]] = deque()
        try:
            for group in groups:
                pending.append((group, self._threads.submit(self._ask, pickle.dumps(group, pickle.HIGHEST_PROTOCOL))))
                yield from self._finish(pending, _AHEAD * len(self._all))
        except InvalidTrainingFile:
            yield from self._finish(pending, 0)
            raise
        yield from self._finish(pending, 0)

    def _finish(self, pending: "deque[tuple[G, Future[bytes | None]]]", most: int) -> Iterator[T]:
        while len(pending) > most:
            group, coming = pending.popleft()
            found = coming.result()
            yield self._work(group) if found is None else pickle.loads(found)  # noqa: S301  it comes from ourselves

    def _ask(self, group: bytes) -> bytes | None:
        process = self._idle.get()
        try:
            return process.ask(group)
        finally:
            self._idle.put(process)


def _pickled(work: object) -> bytes | None:
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError):  # a plug-in's encoder may be made in a function
        return None


class _Process:
    """One process, which is started when it is first asked. Used by one thread at a time."""

    def __init__(self, settings: bytes) -> None:
        self._settings = settings
        self._popen: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._is_closed = self._has_answered = False

    def ask(self, group: bytes) -> bytes | None:
        """What it makes of a group; None where it fails. The next group starts another process if this one ended,
        unless it never answered."""
        try:
            connection = self._connection or self._start()
            connection.send_bytes(group)
            answer = connection.recv_bytes()
        except (OSError, EOFError):
            self.end()
            self._is_closed = self._is_closed or not self._has_answered
            return None
        self._has_answered = True
        return answer or None

    def _start(self) -> "Connection":
        if self._is_closed:
            raise EOFError
        ours, theirs = socket.socketpair()
        with ours, theirs:
            path = "\n".join([str(Path(__file__).parents[2]), *(entry or str(Path.cwd()) for entry in sys.path)])
            command = [sys.executable, "-ISB", "-Xutf8", "-c", _START, str(theirs.fileno()), path]
            self._popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
            self._connection = Connection(ours.detach())
        self._connection.send_bytes(self._settings)
        return self._connection

    def kill(self) -> None:
        """Ends the process, whatever it is doing, and starts no other."""
        self._is_closed = True
        if self._popen is not None:
            self._popen.kill()

    def end(self) -> None:
        """Frees what the process had."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()
        if self._connection is not None:
            self._connection.close()
        self._popen = self._connection = None


def main() -> None:
    """A process: reads the function and then groups, until its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    with Connection(int(sys.argv[1])) as connection, suppress(EOFError, OSError):
        work = pickle.loads(connection.recv_bytes())  # noqa: S301  it comes from our own parent
        collect_seldom()
        while True:
            connection.send_bytes(_answer(work, connection.recv_bytes()))


def collect_seldom() -> None:
    """A group's objects go with it and hold none in a circle: to look for such takes a twelfth of the time."""
    gc.freeze()
    gc.set_threshold(100_000)


def _answer(work: Callable[[Any], Any], group: bytes) -> bytes:
    """Nothing where it fails: the parent tries it again, and says why."""
    try:
        return pickle.dumps(work(pickle.loads(group)), pickle.HIGHEST_PROTOCOL)  # noqa: S301  as above
    except Exception:  # noqa: BLE001  whatever it is, it is raised again there
        return b""
