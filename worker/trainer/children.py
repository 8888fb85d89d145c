"""Runs a run's other ranks as child processes of rank 0.

They are in rank 0's process group, so that a signal to the group ends them all (torchrun's workers start sessions of
their own and would survive it), and on Linux they end with rank 0.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from pydantic import ValidationError

from tunery import processes
from tunery.trainer_protocol import EXIT_PAUSED, EXIT_USER_ERROR, Failed, parse
from worker.trainer.report import MessageWriter

GRACE = 5.0
"""Seconds from the end of one rank to that of the run: ranks that end for the same reason do so within it, unaided."""
_ECHO = 2.0
"""Seconds for which rank 0 waits to learn whether its own error only follows from another rank's end."""


class Children:
    """Ranks 1 to n-1. If one ends while rank 0 is running, the run ends, as it would wait for that rank forever."""

    def __init__(self, writer: MessageWriter) -> None:
        self._writer = writer
        self._count = 0
        self._failed: Failed | None = None
        self._one_failed = threading.Event()
        self._said = threading.Lock()

    def start(self, folder: Path, world: int) -> None:
        """Starts the ranks and makes this process rank 0 of `world`."""
        if world == 1:
            return
        self._count = world - 1
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes.free_port())}
        os.environ.update(shared, RANK="0", LOCAL_RANK="0")
        for rank in range(1, world):
            environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "worker.trainer", str(folder)]
            child = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                # Why not set by the rank itself: rank 0 may end while the rank still imports.
                preexec_fn=processes.dies_with_parent(signal.SIGKILL),
            )
            threading.Thread(target=self._watch, args=(child, rank), daemon=True).start()

    def say_failed(self, own: Failed) -> Failed:
        """Reports once why the run failed, and returns it: a child's reason if rank 0's error only follows from its
        end.
        """
        if self._count and own.kind == "crashed":
            self._one_failed.wait(_ECHO)
        failed = self._failed if self._failed is not None and own.kind == "crashed" else own
        if self._said.acquire(blocking=False):
            with contextlib.suppress(BrokenPipeError):
                self._writer.write(failed)
        return failed

    def _watch(self, child: subprocess.Popen[bytes], rank: int) -> None:
        assert child.stdout is not None
        said: Failed | None = None
        for line in child.stdout:  # not only after its end: rank 0 may notice earlier that it is alone
            if (said := _failed(line) or said) is not None:
                self._note(said)
        code = child.wait()
        failed = said or _unexplained(rank, code)
        if code not in {0, EXIT_PAUSED}:
            self._note(failed)
        if code >= 0:  # a signal ends one rank only; an exit code may be that of all
            time.sleep(GRACE)
        os._exit(exit_code(self.say_failed(failed)))

    def _note(self, failed: Failed) -> None:
        self._failed = self._failed or failed
        self._one_failed.set()


def exit_code(failed: Failed) -> int:
    """Returns the exit code of a rank that failed like this."""
    return EXIT_USER_ERROR if failed.kind in {"user_error", "nan_loss"} else 1


def _failed(line: bytes) -> Failed | None:
    """Returns a child's reason for failing, if the line is one."""
    with contextlib.suppress(ValidationError):
        if isinstance(said := parse(line), Failed):
            return said
    return None


def _unexplained(rank: int, code: int) -> Failed:
    message = f"Rank {rank} exited with code {code} while the others were running; the log has the reason."
    return Failed(kind="crashed", code="training_crashed", message=message)
