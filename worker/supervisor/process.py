"""The trainer's process: started in its own group, read line by line, and ended with all its children."""

import logging
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from tunery import trainer_protocol as protocol
from tunery.processes import dies_with_parent, tail

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
"""The directory that holds the package `worker`, where `python -m worker.trainer` is found."""
MARK = "TUNERY_SLOT"
"""The environment variable by which a trainer and its children name the slot that they work for."""
_PASSED_ON = re.compile(
    "PATH|HOME|USER|SHELL|LANG|LANGUAGE|LC_.*|TZ|TMPDIR|TEMP|VIRTUAL_ENV|PYTHON.*|LD_LIBRARY_PATH|LD_PRELOAD|SSL_CERT_.*"
    "|TUNERY_STACK|TUNERY_PLUGINS|TUNERY_PREPARED_FRACTION|TUNERY_LM_EVAL_TASKS|HF_HOME|HF_HUB_OFFLINE|HF_DATASETS_(CACHE|OFFLINE)|XDG_CACHE_.*|(CUDA|NVIDIA|NCCL|TRITON|BNB|ACCELERATE|OMP|MKL|OPENBLAS|GOMP)_.*|(PY)?TORCH.*"
)


def environment(gpus: tuple[int, ...], mark: str, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns a trainer's environment: listed variables only, so that no secret of the worker is passed on."""
    source = os.environ if names is None else names
    passed = {name: value for name, value in source.items() if _PASSED_ON.fullmatch(name)}
    return passed | {
        MARK: mark,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in gpus),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # progress bars of libraries would end up in the log or in a failure's reason
    }


def _spawn(argument: str, names: Mapping[str, str], stdin: int, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "worker.trainer", argument],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=ROOT,
        env=names,
        start_new_session=True,
        preexec_fn=dies_with_parent(signal.SIGKILL),
    )


class Preloaded:
    """A trainer's process started before its job: it imports what a run needs and waits for a run directory.

    Imports take 6 to 20 seconds, most of the time between a short job's claim and its first step. The process knows no
    job until it is given one, and works on that one alone.
    """

    def __init__(self, gpus: tuple[int, ...], mark: str, log: Path) -> None:
        self.log = log
        self._environment = environment(gpus, mark)
        log.parent.mkdir(parents=True, exist_ok=True)  # a full disk may have been cleared by hand since the start
        with log.open("wb") as errors:
            self.process = _spawn("--wait", self._environment, subprocess.PIPE, errors)

    def hand_over(self, run_dir: Path, gpus: tuple[int, ...], mark: str) -> bool:
        """Gives the process `run_dir` to work on; returns whether it took it. If not, it is ended.

        CUDA reads only once which GPUs a process may see, so it must have been started for these GPUs.
        """
        if self.process.poll() is None and environment(gpus, mark) == self._environment:
            assert self.process.stdin is not None
            with suppress(BrokenPipeError):
                self.process.stdin.write(os.fsencode(run_dir) + b"\n")
                self.process.stdin.close()
                return True
        self.end()
        return False

    def end(self) -> None:
        """Kills the process unless it has ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class Trainers:
    """Starts a slot's trainers, and keeps one process ready for the next job if it is given a `log`.

    `gpus`: those that the next job is expected to get, namely the last job's.
    """

    def __init__(self, mark: str, gpus: tuple[int, ...] = (), log: Path | None = None) -> None:
        self.mark = mark
        self._gpus, self._log = gpus, log
        self._next: Preloaded | None = None

    def make_ready(self) -> None:
        """Starts the process for the next job unless one is waiting; call it from a thread that outlives it."""
        if self._log is not None and (self._next is None or self._next.process.poll() is not None):
            self._next = Preloaded(self._gpus, self.mark, self._log)

    def start(self, run_dir: Path, gpus: tuple[int, ...]) -> "Trainer":
        """Returns the trainer of `run_dir` on these GPUs."""
        preloaded, self._next, self._gpus = self._next, None, gpus
        return Trainer(run_dir, gpus, self.mark, preloaded)


class Trainer:
    """A running `python -m worker.trainer RUN_DIR`. Its standard error goes to RUN_DIR/log.txt.

    Start it from a thread that outlives it: Linux ends it with the thread that spawned it, so that a killed worker
    leaves nothing running on its GPU.
    """

    def __init__(self, run_dir: Path, gpus: tuple[int, ...], mark: str, preloaded: "Preloaded | None" = None) -> None:
        self.mark = mark
        self._log = run_dir / "log.txt"
        self._log.touch()
        self._preloaded = preloaded if preloaded is not None and preloaded.hand_over(run_dir, gpus, mark) else None
        if self._preloaded is not None:
            self._process = self._preloaded.process
        else:
            with self._log.open("ab") as errors:
                self._process = _spawn(str(run_dir), environment(gpus, mark), subprocess.DEVNULL, errors)
        self._said: queue.SimpleQueue[protocol.Spoken | None] = queue.SimpleQueue()
        self._gone = threading.Event()
        # A separate thread empties the pipe: a trainer must never wait for one of the worker's uploads.
        threading.Thread(target=self._listen, name="tunery-listen", daemon=True).start()
        threading.Thread(target=self._reap, name="tunery-reap", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log_path(self) -> Path:
        return self._log

    def messages(self, *, every: float) -> Iterator[protocol.Spoken | None]:
        """Yields messages as they arrive until the output ends; None after `every` seconds without one."""
        while True:
            try:
                said = self._said.get(timeout=every)
            except queue.Empty:
                yield None
                continue
            if said is None:
                return
            yield said

    def wait(self) -> int:
        """Waits for the whole process group to end; returns the exit status (negative: the signal that ended it)."""
        status = self._process.wait()
        self._gone.wait()
        return status

    def ask_to_stop(self) -> None:
        """Sends SIGTERM to the leader alone: it informs its ranks, and saves nothing if its loaders have died."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL to the group, which saves nothing. Once it has ended, its id may be reused: nothing is sent."""
        if self._gone.is_set():
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def log_tail(self, lines: int = 12) -> str:
        """Returns the last lines of its log."""
        return tail(self._log, lines)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            with self._process.stdout as output:
                for line in output:
                    self._hear(line)
        finally:  # without this end marker the supervisor would wait forever
            self._said.put(None)

    def _hear(self, line: bytes) -> None:
        try:
            self._said.put(protocol.parse(line))
        except ValidationError:  # printed by a library: part of the log
            # If a full disk loses it, later messages are still read.
            with suppress(OSError), self._log.open("ab") as file:
                file.write(line)

    def _reap(self) -> None:
        # A child that outlives the leader would keep the pipe open, and the listener would wait for it.
        self._process.wait()
        self.kill()
        if self._preloaded is not None:
            with suppress(OSError):
                if self._log.stat().st_size == 0:  # the trainer ended before it opened its log
                    shutil.copyfile(self._preloaded.log, self._log)
        self._gone.set()
