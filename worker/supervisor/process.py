"""A trainer's process: started in a group of its own, listened to line by line, and ended with all its children."""

import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from tunery import wire
from tunery.processes import dies_with_parent, tail

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
"""The tree that holds `worker`: where `python -m worker.trainer` is found."""
MARK = "TUNERY_SLOT"
"""Names, in the environment of a trainer and its children, the slot that they work for."""
_PASSED_ON = re.compile(
    "PATH|HOME|USER|SHELL|LANG|LANGUAGE|LC_.*|TZ|TMPDIR|TEMP|VIRTUAL_ENV|PYTHON.*|LD_LIBRARY_PATH|LD_PRELOAD|SSL_CERT_.*"
    "|TUNERY_STACK|TUNERY_PLUGINS|TUNERY_LM_EVAL_TASKS|HF_HOME|HF_HUB_OFFLINE|HF_DATASETS_(CACHE|OFFLINE)|XDG_CACHE_.*|(CUDA|NVIDIA|NCCL|TRITON|BNB|ACCELERATE|OMP|MKL|OPENBLAS|GOMP)_.*|(PY)?TORCH.*"
)


def environment(gpus: tuple[int, ...], mark: str, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a trainer may see: named one by one, so that a new secret of the worker's is not passed on by default."""
    source = os.environ if names is None else names
    passed = {name: value for name, value in source.items() if _PASSED_ON.fullmatch(name)}
    return passed | {
        MARK: mark,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in gpus),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # libraries draw progress bars into what is a log, or a failure's reason
    }


class Trainer:
    """`python -m worker.trainer RUN_DIR`. Its standard error goes to RUN_DIR/log.txt.

    Start it from a thread that outlives it: Linux ends it with the thread that spawned it, so that a killed worker
    leaves nothing behind on its GPU.
    """

    def __init__(self, run_dir: Path, gpus: tuple[int, ...], mark: str) -> None:
        self._log = run_dir / "log.txt"
        with self._log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.trainer", str(run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=environment(gpus, mark),
                start_new_session=True,
                preexec_fn=dies_with_parent(signal.SIGKILL),
            )
        self._said: queue.SimpleQueue[wire.Spoken | None] = queue.SimpleQueue()
        self._gone = threading.Event()
        # A thread of its own empties the pipe: a trainer must never wait for a slow upload of ours.
        threading.Thread(target=self._listen, name="tunery-listen", daemon=True).start()
        threading.Thread(target=self._bury, name="tunery-bury", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log_path(self) -> Path:
        return self._log

    def messages(self, *, every: float) -> Iterator[wire.Spoken | None]:
        """What it says, as it says it, to the end of its output; None at least `every` seconds of silence."""
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
        """Its exit status (negative: the signal that ended it), when the whole group is gone."""
        status = self._process.wait()
        self._gone.wait()
        return status

    def ask_to_stop(self) -> None:
        """SIGTERM to the leader alone: it tells its ranks, and nothing can be saved once a data loader has died."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the group: nothing is saved. Once it is gone its number may be another's, and nothing is sent."""
        if self._gone.is_set():
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def last_words(self, lines: int = 12) -> str:
        """The end of its log."""
        return tail(self._log, lines)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            with self._process.stdout as output:
                for line in output:
                    self._hear(line)
        finally:  # without its end the supervisor would listen for ever
            self._said.put(None)

    def _hear(self, line: bytes) -> None:
        try:
            self._said.put(wire.parse(line))
        except ValidationError:  # a library that prints: part of the log
            # Its loss, on a full disk, is no reason to hear nothing more.
            with suppress(OSError), self._log.open("ab") as file:
                file.write(line)

    def _bury(self) -> None:
        # A child that outlived the leader would hold the pipe open, and the listener would wait for it.
        self._process.wait()
        self.kill()
        self._gone.set()
