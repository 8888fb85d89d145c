"""Runs a run's other ranks as child processes of rank 0.

They are in rank 0's process group, so that a signal to the group ends them all (torchrun's workers start sessions of
their own and would survive it), and on Linux they end with rank 0.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from tunery import processes
from tunery.trainer_protocol import EXIT_PAUSED, EXIT_USER_ERROR, Failed, parse
from worker.trainer.report import MessageWriter

AS_RANK = "--wait-as-rank"
"""The argument with which a process waits to become one of the other ranks."""
GRACE = 5.0
"""Seconds from the end of one rank to that of the run: ranks that end for the same reason do so within it, unaided."""
_ECHO = 2.0
"""Seconds for which rank 0 waits to learn whether its own error only follows from another rank's end."""


class Children:
    """Ranks 1 to n-1. If one ends while rank 0 is running, the run ends, as it would wait for that rank forever.

    They are started before rank 0 imports what a run needs, which takes seconds, so that all import it at once.
    """

    def __init__(self, writer: MessageWriter, *, log_in_folder: bool = False) -> None:
        """`log_in_folder`: the ranks write their log to the run's directory, and not where this process writes now."""
        self.writer, self._log_in_folder = writer, log_in_folder
        self._waiting: list[subprocess.Popen[bytes]] = []
        self._count = 0
        self._failed: Failed | None = None
        self._one_failed = threading.Event()
        self._said = threading.Lock()

    def make_ready(self, world: int) -> None:
        """Starts the ranks of a run on `world` devices, which import what it needs and wait for its directory."""
        for _ in range(1, world):
            child = subprocess.Popen(
                [sys.executable, "-m", "worker.trainer", AS_RANK],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Why not set by the rank itself: rank 0 may end while the rank still imports.
                preexec_fn=processes.dies_with_parent(signal.SIGKILL),
            )
            self._waiting.append(child)

    def start(self, folder: Path, world: int) -> None:
        """Gives the ranks their run and makes this process rank 0 of `world`."""
        if len(self._waiting) != world - 1 or any(child.poll() is not None for child in self._waiting):
            self._end_waiting()
            self.make_ready(world)
        if world == 1:
            return
        self._count = world - 1
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes.free_port())}
        os.environ.update(shared, RANK="0", LOCAL_RANK="0")
        for rank, child in enumerate(self._waiting, 1):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError), child.stdin as pipe:  # its end is noticed by `_watch`
                given = {"run_dir": str(folder), "environment": environment, "log_in_folder": self._log_in_folder}
                pipe.write(json.dumps(given).encode() + b"\n")
            threading.Thread(target=self._watch, args=(child, rank), daemon=True).start()
        self._waiting = []

    def _end_waiting(self) -> None:
        for child in self._waiting:
            child.kill()
            child.wait()
        self._waiting = []

    def say_failed(self, own: Failed) -> Failed:
        """Reports once why the run failed, and returns it: a child's reason if rank 0's error only follows from its
        end.
        """
        if self._count and own.kind == "crashed":
            self._one_failed.wait(_ECHO)
        failed = self._failed if self._failed is not None and own.kind == "crashed" else own
        if self._said.acquire(blocking=False):
            with contextlib.suppress(BrokenPipeError):
                self.writer.write(failed)
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


def devices_of(environment: Mapping[str, str]) -> int:
    """Returns how many GPUs a process with this environment sees, as the supervisor names them; at least 1."""
    return max(1, len([each for each in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]))


def devices_asked(folder: Path) -> int:
    """Returns how many devices a run asks for; 1 if its spec cannot be read, of which the run itself complains."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return int(json.loads((folder / "spec.json").read_bytes())["plan"]["resources"]["gpus"])
    return 1


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
