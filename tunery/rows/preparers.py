"""Prepares groups of a large file's rows in several processes, as one process keeps only one core busy.

A process is a fresh Python with the same path. It gets a function and then groups, and returns the function's results,
all pickled, which is safe as both ends are ours. Chat templates are not ours: they run in separate processes
(`sandbox`), one for each of these. A group that fails in a process is prepared here instead, so errors have the same
words, and a process that dies costs only time.
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
"""Rows of a group. Smaller groups have more overhead."""
MOST = 4
"""Maximum processes. Each takes about 150 MiB with its renderer."""
_AHEAD = 2
"""Groups per process that are read in advance; limited so that memory does not grow with the file."""
_START = "import sys; sys.path[:] = sys.argv.pop().split('\\n'); from tunery.rows.preparers import main; main()"


def _cores() -> int:
    """Returns the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


COUNT = min(_cores(), MOST)


class Preparers(Generic[G, T]):
    """A context of up to `count` processes, which start with the first group and end with the `with` block."""

    def __init__(self, work: Callable[[G], T], count: int) -> None:
        """`work`: the function for a group. If it cannot be pickled, or `count` is 1, it runs in this process."""
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
        """Yields the result for each group, in order. Raises what `groups` raises, after the results before it."""
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
    """One process, which is started at its first group. Used by one thread at a time."""

    def __init__(self, settings: bytes) -> None:
        self._settings = settings
        self._popen: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._is_closed = self._has_answered = False

    def ask(self, group: bytes) -> bytes | None:
        """Returns the result for a group; None if it fails. If the process ended, the next group starts another one,
        unless this one never answered."""
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
        """Kills the process and starts no other."""
        self._is_closed = True
        if self._popen is not None:
            self._popen.kill()

    def end(self) -> None:
        """Releases the process's resources."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()
        if self._connection is not None:
            self._connection.close()
        self._popen = self._connection = None


def main() -> None:
    """Runs in the child process: reads the function and then groups, until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    with Connection(int(sys.argv[1])) as connection, suppress(EOFError, OSError):
        work = pickle.loads(connection.recv_bytes())  # noqa: S301  it comes from our own parent
        collect_seldom()
        while True:
            connection.send_bytes(_answer(work, connection.recv_bytes()))


def collect_seldom() -> None:
    """Makes the garbage collector run rarely: a group's objects have no cycles, and looking for them takes 1/12 of the
    time."""
    gc.freeze()
    gc.set_threshold(100_000)


def _answer(work: Callable[[Any], Any], group: bytes) -> bytes:
    """Returns the pickled result; empty on an error, as the parent then tries again and reports it."""
    try:
        return pickle.dumps(work(pickle.loads(group)), pickle.HIGHEST_PROTOCOL)  # noqa: S301  as above
    except Exception:  # noqa: BLE001  it is raised again in the parent
        return b""
