"""Sends a run's measurements to the experiment trackers that its job asks for, through one process for each.

docs/decisions/0029 says why neither the trainer nor this process talks to them. A tracker's failure raises nothing
here: the job goes on without the tracker, and an event says so.
"""

import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery import trainer_protocol as protocol
from tunery.jobs import ledger
from tunery.jobs.model import JobEvent
from tunery.processes import dies_with_parent
from tunery.settings import Settings
from worker.supervisor import measured
from worker.supervisor.lease import LeaseKeeper
from worker.supervisor.process import ROOT, environment
from worker.supervisor.staging import Tracked

log = logging.getLogger(__name__)

NAMES = {"wandb": "Weights & Biases", "mlflow": "MLflow"}
_SETTINGS = {"wandb": "TUNERY_WANDB_MODE", "mlflow": "TUNERY_MLFLOW_TRACKING_URI"}
"""The setting without which a tracker receives nothing."""
END_SECONDS = 30.0
"""Time limit for sending what is still queued when the run has ended: its device is held meanwhile."""
_PROXIES = re.compile("(HTTPS?|NO|ALL)_PROXY|REQUESTS_CA_BUNDLE", re.IGNORECASE)
_ABSENT = ("ModuleNotFoundError", "ImportError")


class Tracker:
    """A running `python -m worker.trackers`. A separate thread writes to it, as it may hang and its pipe fill up."""

    def __init__(self, order: Mapping[str, Any], names: Mapping[str, str], said: Path) -> None:
        self.kind: str = order["type"]
        self._said = said
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        with said.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.trackers"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.DEVNULL,
                cwd=ROOT,
                env=dict(names),
                start_new_session=True,
                preexec_fn=dies_with_parent(signal.SIGKILL),
            )
        self.send(order)
        self._thread = threading.Thread(target=self._write, name=f"tunery-{self.kind}", daemon=True)
        self._thread.start()

    def send(self, entry: Mapping[str, Any]) -> None:
        """Queues a line for the process."""
        self._lines.put(json.dumps(entry) + "\n")

    @property
    def fault(self) -> str | None:
        """Why the process ended early; None while it runs and after a normal end."""
        status = self._process.poll()
        if status in (None, 0):
            return None
        said = self._said.read_text(errors="replace").strip()
        if said in _ABSENT:
            return "its package is not installed on the worker"
        return said or f"no answer in {END_SECONDS:.0f} s"

    def end(self, seconds: float) -> None:
        """Waits up to `seconds` until everything is sent, then kills the process with its children."""
        self._lines.put(None)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._thread.join()

    def _write(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as pipe:  # an ended process reads no more
            while (line := self._lines.get()) is not None:
                pipe.write(line.encode())
                pipe.flush()


class Trackers:
    """The trackers of one attempt, from its first message to its last."""

    def __init__(self, keeper: LeaseKeeper, settings: Settings, run_dir: Path, mark: str, tracked: Tracked) -> None:
        self.mark = mark
        self._keeper, self._settings, self._run_dir, self._tracked = keeper, settings, run_dir, tracked
        self._running: list[Tracker] = []
        self._outcome = "interrupted"

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        """Starts a process for each tracker that the operator has set up, and warns of the others."""
        for number, integration in enumerate(self._tracked.integrations):
            names = self._environment(integration["type"])
            if names is None:
                name, setting = NAMES[integration["type"]], _SETTINGS[integration["type"]]
                self._warn(f"This server sends nothing to {name}: the operator has not configured it ({setting})")
                continue
            order = {**integration, "job": self._keeper.lease.job_id, "config": self._tracked.config}
            self._running.append(Tracker(order, names, self._run_dir / f"tracker-{number}.txt"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = END_SECONDS if kind is None else 0.0
        for tracker in self._running:
            tracker.send({"outcome": self._outcome})
            tracker.end(seconds)
        if kind is None:
            self._drop_faulty(ended=True)

    def record(self, message: protocol.Spoken | None) -> None:
        """Sends what a message measures; None stands for a moment without messages."""
        if self._running:
            self._drop_faulty()
        match message:
            case protocol.Step():
                self._tell(message.step, measured.of_step(message))
            case protocol.Evaluated():
                self._tell(message.step, measured.of_evaluation(message))
            case protocol.Score():
                self._tell(None, measured.of_score(message))
            case protocol.Finished():
                self._outcome = "succeeded"
            case protocol.Failed() if message.kind != "crashed":
                self._outcome = "failed"

    def _tell(self, step: int | None, measures: Mapping[str, float]) -> None:
        for tracker in self._running:
            tracker.send({"step": step, "measures": measures})

    def _drop_faulty(self, *, ended: bool = False) -> None:
        for tracker in [tracker for tracker in self._running if tracker.fault is not None]:
            name = NAMES[tracker.kind]
            self._warn(f"{name} receives nothing from this run ({tracker.fault}). The job continues without it")
            self._running.remove(tracker)
            if not ended:
                tracker.end(0)

    def _warn(self, message: str) -> None:
        log.warning("%s: %s", self._keeper.lease.job_id, message)
        self._keeper.write(lambda session: _note_once(session, self._keeper.lease.job_id, message))

    def _environment(self, kind: str) -> dict[str, str] | None:
        """Returns the environment of a tracker's process; None if the operator has not set the tracker up."""
        own = _of_wandb(self._settings) if kind == "wandb" else _of_mlflow(self._settings)
        if own is None:
            return None
        proxies = {name: value for name, value in os.environ.items() if _PROXIES.fullmatch(name)}
        return environment((), self.mark) | proxies | own


def _of_wandb(settings: Settings) -> dict[str, str] | None:
    if settings.wandb_mode == "off":
        return None
    folder = str(settings.trackers_dir.absolute())
    names = {"WANDB_MODE": settings.wandb_mode, "WANDB_DIR": folder, "WANDB_SILENT": "true"}
    if settings.wandb_api_key is not None:
        names["WANDB_API_KEY"] = settings.wandb_api_key.get_secret_value()
    if settings.wandb_base_url is not None:
        names["WANDB_BASE_URL"] = settings.wandb_base_url
    return names


def _of_mlflow(settings: Settings) -> dict[str, str] | None:
    if settings.mlflow_tracking_uri is None:
        return None
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    # Without it MLflow refuses the address of a folder, which it still supports but no longer develops.
    return (
        patience
        | {"MLFLOW_ALLOW_FILE_STORE": "true"}
        | {"MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri.get_secret_value()}
    )


def _note_once(session: Session, job_id: str, message: str) -> None:
    """Adds an event unless the job has it already, from an earlier attempt."""
    said: Iterable[str] = session.scalars(select(JobEvent.message).where(JobEvent.job_id == job_id))
    if message not in said:
        ledger.note(session, job_id, message, level="warn")
