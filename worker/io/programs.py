"""Programs of the trainer that a worker for I/O runs on a folder: spawned, watched, and ended with the worker."""

import logging
import signal
import subprocess
import sys
from pathlib import Path

from tunery.processes import dies_with_parent, tail
from tunery.wire import EXIT_USER_ERROR
from worker.supervisor.drain import Drain
from worker.supervisor.process import ROOT, environment

log = logging.getLogger(__name__)


def run(
    arguments: list[str], folder: Path, drain: Drain, *, what: str, variables: dict[str, str] | None = None
) -> str | None:
    """Runs `python -m ARGUMENTS`, which works in `folder`; why it failed, or None. A worker that shuts down ends it."""
    errors_path = folder / "errors.txt"
    with errors_path.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=ROOT,
            env=environment((), str(folder)) if variables is None else variables,
            start_new_session=True,
            preexec_fn=dies_with_parent(signal.SIGKILL),
        )
        while (status := _status(process)) is None:
            if drain.begun:
                process.kill()
    return None if status == 0 else _reason(status, errors_path, what)


def _status(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return None


def _reason(status: int, errors_path: Path, what: str) -> str:
    if status == EXIT_USER_ERROR:
        return tail(errors_path, 1)  # libraries have said something before it
    said = tail(errors_path, 50)
    log.error("the %s ended with status %s: %s", what, status, said or "(nothing)")
    last = said.rpartition("\n")[2] or f"it ended with status {status} and said nothing"
    return f"The {what} broke: {last.rstrip('.')}. The I/O worker's log has more."
