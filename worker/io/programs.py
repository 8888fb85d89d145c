"""Runs programs on a folder for a worker: starts and watches them, and ends them with the worker."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunery.db import UNREACHABLE
from tunery.processes import dies_with_parent, ending, tail
from tunery.storage.errors import StorageFailed
from tunery.trainer_protocol import EXIT_USER_ERROR
from worker.supervisor.drain import Drain
from worker.supervisor.process import ROOT, environment

log = logging.getLogger(__name__)
_ROOM_FOR_WORDS = 64 * 1024
"""Bytes that a program needs to print its errors."""


@contextmanager
def workplace(
    parent: Path,
    doing: str,
    subject: str,
    fail: Callable[[Exception], object],
    release: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """Yields a folder in `parent` for one piece of work (`doing`, on `subject`), and removes it afterwards.

    An internal error is passed to `fail` and not raised: it must not keep later pieces from their turn. If storage or
    the database is unreachable, that is raised after `release`, and the work is done another time.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{doing}-", dir=parent))
    try:
        with _broken_work(doing, subject, fail):
            yield folder
    except (StorageFailed, *UNREACHABLE):
        release()
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _broken_work(doing: str, subject: str, fail: Callable[[Exception], object]) -> Iterator[None]:
    """Passes errors of the block to `fail`, except those of unreachable storage or an unreachable database."""
    try:
        yield
    except (StorageFailed, *UNREACHABLE):
        raise
    except Exception as error:
        log.exception("%s %s failed", doing, subject)
        fail(error)


class Program:
    """A process of `python -m ARGUMENTS`, which works in `folder`; its standard error is `errors.txt` there.

    One that `waits` imports what it needs and reads its work from standard input. Start it from a thread that outlives
    it: Linux ends it with the thread that spawned it.
    """

    def __init__(
        self, arguments: list[str], folder: Path, variables: dict[str, str] | None = None, *, waits: bool = False
    ) -> None:
        self._errors = folder / "errors.txt"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=ROOT,
                env=environment((), str(folder)) if variables is None else variables,
                start_new_session=True,
                preexec_fn=dies_with_parent(signal.SIGKILL),
            )

    def begin(self, arguments: list[str]) -> bool:
        """Gives a waiting process its arguments; returns False if it has ended before."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(json.dumps(arguments).encode() + b"\n")
            pipe.flush()
            return True
        return False

    def outcome(
        self,
        drain: Drain,
        *,
        what: str,
        watch: Callable[[], object] = lambda: None,
        seconds: float | None = None,
        too_slow: str = "Split the file.",
    ) -> str | None:
        """Waits for the end of the process; returns why it failed, or None. See `run`."""
        deadline = None if seconds is None else time.monotonic() + seconds
        is_late = False
        while (status := _status(self._process)) is None:
            watch()
            is_late = deadline is not None and time.monotonic() > deadline
            if drain.begun or is_late:
                self._process.kill()
        if is_late and status != 0 and seconds is not None:
            return f"The {what} took more than {seconds // 60:.0f} minutes. {too_slow}"
        return None if status == 0 else _reason(status, self._errors, what)

    def end(self) -> None:
        """Kills the process unless it has ended."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()


def run(
    arguments: list[str],
    folder: Path,
    drain: Drain,
    *,
    what: str,
    variables: dict[str, str] | None = None,
    watch: Callable[[], object] = lambda: None,
    seconds: float | None = None,
    too_slow: str = "Split the file.",
) -> str | None:
    """Runs `python -m ARGUMENTS`, which works in `folder`; returns why it failed, or None.

    The program is ended when the worker shuts down, or after `seconds`, if given; `too_slow` says what to change then.
    `watch` is called twice a second; if it raises, the program is killed.
    """
    program = Program(arguments, folder, variables)
    try:
        return program.outcome(drain, what=what, watch=watch, seconds=seconds, too_slow=too_slow)
    finally:
        program.end()


def _status(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return None


def _reason(status: int, errors_path: Path, what: str) -> str:
    if status == EXIT_USER_ERROR:
        return tail(errors_path, 1)  # libraries may have written something before it
    said = tail(errors_path, 50)
    log.error("the %s %s: %s", what, ending(status), said or "(nothing)")
    last = said.rpartition("\n")[2] or f"it {ending(status)} and {_why_silent(errors_path.parent)}"
    if status < 0:  # what it printed before, such as a library's warning, does not say why it ended
        last = f"it {ending(status)}"
    return f"The {what} failed: {last.rstrip('.')}. The worker's log has the details."


def _why_silent(folder: Path) -> str:
    """Returns what is known of a program that printed nothing: on a full disk it cannot even say why it failed."""
    if shutil.disk_usage(folder).free < _ROOM_FOR_WORDS:
        return "its worker's disk is full: ask the operator to free space there"
    return "printed nothing"
