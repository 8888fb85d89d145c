"""Records a run: writes each message of the trainer to the database and stores its files."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import func
from sqlalchemy.orm import Session

from tunery import trainer_protocol as protocol
from tunery.artifacts import manifest
from tunery.artifacts import model as artifacts
from tunery.artifacts.manifest import Manifest
from tunery.jobs import leases, ledger
from tunery.jobs.errors import LeaseLost
from tunery.jobs.model import Job
from tunery.models import registry
from tunery.models.model import Model
from tunery.settings import Settings
from tunery.storage import Storage
from tunery.storage.errors import StorageFailed
from worker.supervisor import kept_checkpoints, measured, upload, verdicts
from worker.supervisor.lease import LeaseKeeper
from worker.supervisor.staging import StoredFolder

log = logging.getLogger(__name__)

BATCH_SECONDS = 1.0
"""Steps of this many seconds are written in one transaction."""
_BYTES_A_PARAM = 4
"""Bytes per parameter of a model that is not stored yet: an adapter's fp32."""


class RunRecorder:
    """Records one attempt: rows at once or in batches of a second, and uploads one by one in a thread of their own.

    `record` raises LeaseLost if this attempt no longer holds the job.
    """

    def __init__(self, keeper: LeaseKeeper, settings: Settings, storage: Storage, run_dir: Path, *, keep: int) -> None:
        self._keeper, self._settings, self._storage, self.run_dir, self._keep = keeper, settings, storage, run_dir, keep
        self._steps: dict[int, dict[str, Any]] = {}
        self._validated: dict[int, dict[str, Any]] = {}  # apart, as a step's row may be written before its checkpoint
        self._newest: protocol.Step | None = None
        self._total_steps: int | None = None
        self._about: dict[str, Any] = {"device": None}
        self._flushed_at = 0.0
        self._evaluating = False
        self._uploads = ThreadPoolExecutor(1, "tunery-upload")
        self._pending: list[Future[None]] = []
        self._snapshots: dict[str, StoredFolder] = {}
        self._older: str | None = None
        self._upload_pace = upload.UploadPace()
        self._result_bytes = 0
        self.final_message: protocol.Finished | protocol.Paused | protocol.Failed | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._uploads.shutdown(wait=True, cancel_futures=kind is not None)

    @property
    def prefix(self) -> str:
        """The storage prefix of everything that this attempt stores, and of nothing else."""
        return f"jobs/{self._keeper.lease.job_id}/{self._keeper.lease.number}"

    def record(self, message: protocol.Spoken | None) -> None:
        """Writes what a message reports; None, which stands for a moment without messages, only flushes."""
        match message:
            case protocol.Step():
                self._note_step(message)
            case protocol.Evaluated():
                self._note_evaluation(message)
            case protocol.Phase():
                self._enter(message)
            case protocol.Started():
                self._keeper.write(lambda session: self._start(session, message))
            case protocol.CheckpointSaved():
                self._upload_later(message)
            case protocol.Score() | protocol.Gated():
                self._keeper.write(lambda session: self._note_result(session, message))
            case protocol.Exported():
                self._keeper.write(lambda session: self._note_export(session, message))
            case protocol.Finished() | protocol.Paused() | protocol.Failed():
                self.final_message = message
        if time.monotonic() - self._flushed_at >= BATCH_SECONDS:
            self._flush()

    def close(self) -> None:
        """Finishes pending writes and uploads after the trainer's final message."""
        self._evaluating = False
        self._flush()
        for pending in self._pending:
            pending.result()

    def store_snapshot(self, path: str) -> StoredFolder:
        """Uploads a recovery snapshot unless it is stored already. Raises StorageFailed, FileNotFoundError."""
        if path not in self._snapshots:
            prefix = f"{self.prefix}/{path}"
            listed = upload.insist(
                lambda: upload.publish(self._storage, prefix, self.run_dir / path), give_up=self._keeper.must_leave
            )
            self._snapshots[path] = StoredFolder(prefix, listed.sha256)
        return self._snapshots[path]

    def announce(self, phase: str) -> None:
        """Sets one of the supervisor's own phases, after the trainer has ended."""
        self._enter(protocol.Phase(phase=phase, seconds_left=0))

    def publish(self, path: str, prefix: str, *, seconds: float = upload.PATIENCE_SECONDS) -> Manifest:
        """Stores a model's folder from the run directory. Raises StorageFailed, FileNotFoundError."""
        began = time.monotonic()
        listed = upload.insist(
            lambda: upload.publish(self._storage, prefix, self.run_dir / path),
            give_up=self._keeper.must_leave,
            seconds=seconds,
        )
        self._result_bytes = listed.bytes
        self._upload_pace.note(self._result_bytes, time.monotonic() - began)
        return listed

    # --- steps ---

    def _note_step(self, step: protocol.Step) -> None:
        self._newest, self._keeper.step = step, step.step
        self._steps.setdefault(step.step, {}).update(measured.of_step(step))

    def _note_evaluation(self, evaluated: protocol.Evaluated) -> None:
        found = measured.of_evaluation(evaluated)
        self._steps.setdefault(evaluated.step, {}).update(found)
        self._validated = {evaluated.step: found}
        if evaluated.task_score is not None:
            data = evaluated.model_dump(include={"step", "task_metric", "task_score", "task_rows", "samples"})
            self._keeper.write(
                lambda session: ledger.note(session, self._keeper.lease.job_id, task_message(evaluated), data=data)
            )

    def _enter(self, message: protocol.Phase) -> None:
        # A step that is being evaluated waits for its full validation loss: OpenAI reports both in one event.
        self._evaluating = message.phase == "evaluating"
        self._flush()
        values = {"phase": message.phase} | self._finish(message.seconds_left)
        self._keeper.write(lambda session: leases.record_progress(session, self._keeper.lease, **values))

    def _flush(self) -> None:
        self._flushed_at = time.monotonic()
        newest = self._newest
        kept = {newest.step} if newest is not None and self._evaluating else set()
        rows = {step: values for step, values in self._steps.items() if step not in kept}
        if rows:
            self._keeper.write(lambda session: self._write_steps(session, rows))
            self._steps = {step: values for step, values in self._steps.items() if step in kept}

    def _write_steps(self, session: Session, rows: dict[int, dict[str, Any]]) -> None:
        leases.record_metrics(session, self._keeper.lease, rows)
        for step, values in sorted(rows.items()):
            data = {"step": step, "total_steps": self._total_steps} | _event_data(values)
            message = step_message(step, self._total_steps, values)
            ledger.note(session, self._keeper.lease.job_id, message, type="metrics", data=data)
        if self._newest is not None:
            leases.record_progress(session, self._keeper.lease, **self._progress(self._newest))

    def _progress(self, step: protocol.Step) -> dict[str, Any]:
        values: dict[str, Any] = {
            "step": step.step,
            "progress": measured.finite(
                epoch=step.epoch,
                train_loss=step.train_loss,
                tokens=step.tokens,
                step_seconds=step.seconds,
            )
            | self._about,
        }
        return values | self._finish(step.seconds_left)

    def _finish(self, seconds_left: float | None) -> dict[str, Any]:
        """Returns the job's estimated end: the trainer's estimate, plus the pending uploads and the result's."""
        if seconds_left is None:
            return {}
        waiting = sum(not pending.done() for pending in self._pending)
        seconds = seconds_left + (1 + waiting) * self._upload_pace.seconds(self._result_bytes)
        return {"estimated_finish": func.clock_timestamp() + timedelta(seconds=seconds)}

    # --- single events ---

    def _start(self, session: Session, started: protocol.Started) -> None:
        self._total_steps = started.total_steps
        self._result_bytes = started.trainable_params * _BYTES_A_PARAM
        self._about = started.model_dump(include={"device", "trainable_params", "all_params"})
        leases.record_progress(session, self._keeper.lease, total_steps=started.total_steps, phase="training")
        job_id = self._keeper.lease.job_id
        ledger.note(session, job_id, parameters_message(started))
        if started.first_step > 1:
            ledger.note(session, job_id, f"Resumed from step {started.first_step - 1}/{started.total_steps}")
        if started.replay is not None:
            ledger.note(session, job_id, verdicts.replay_message(started.replay))
        for warning in started.warnings:
            ledger.note(session, job_id, warning, level="warn")

    def _note_result(self, session: Session, message: protocol.Score | protocol.Gated) -> None:
        if isinstance(message, protocol.Score):
            self._score(session, message)
        else:
            self._judge(session, message)

    def _score(self, session: Session, score: protocol.Score) -> None:
        leases.record_progress(session, self._keeper.lease, scorecard=score.model_dump(mode="json", exclude={"type"}))
        ledger.note(session, self._keeper.lease.job_id, score_message(score))
        if score.general is not None:
            ledger.note(session, self._keeper.lease.job_id, verdicts.general_message(score.general))

    def _note_export(self, session: Session, export: protocol.Exported) -> None:
        level, verb = ("warn", "not written") if export.is_refused else ("info", "written")
        ledger.note(session, self._keeper.lease.job_id, f"Export {export.path} {verb}: {export.message}", level=level)

    def _judge(self, session: Session, verdict: protocol.Gated) -> None:
        gate = verdict.model_dump(mode="json", exclude={"type"})
        leases.record_progress(session, self._keeper.lease, gate=gate)
        level = "info" if verdict.status == "passed" else "warn"
        ledger.note(
            session, self._keeper.lease.job_id, verdicts.gate_message(verdict), level=level, data={"gate": gate}
        )

    # --- uploads ---

    def _upload_later(self, saved: protocol.CheckpointSaved) -> None:
        metrics = {"step": saved.step} | (measured.of_step(self._newest) if self._newest else {})
        metrics |= self._validated.get(saved.step, {})
        self._flush()
        self._pending.append(self._uploads.submit(self._upload, saved, metrics))

    def _upload(self, saved: protocol.CheckpointSaved, metrics: dict[str, Any]) -> None:
        try:
            if saved.kind == "snapshot":
                self._keep_snapshot(saved)
            else:
                self._keep_checkpoint(saved, metrics)
        except FileNotFoundError:
            log.info("%s was replaced by a newer one before it was uploaded", saved.path)
        except LeaseLost:
            log.info("%s is not kept: its attempt is over", saved.path)
        except StorageFailed as error:  # losing a checkpoint costs less than ending the run
            log.warning("%s was not stored: %s", saved.path, error)
            self._keeper.write(lambda session: self._note_missing(session, saved.step))

    def _note_missing(self, session: Session, step: int) -> None:
        ledger.note(session, self._keeper.lease.job_id, f"The state of step {step} could not be stored", level="warn")

    def _keep_snapshot(self, saved: protocol.CheckpointSaved) -> None:
        stored = self.store_snapshot(saved.path)
        former = self._keeper.write(
            lambda session: leases.record_snapshot(session, self._keeper.lease, str(stored), step=saved.step)
        )
        if former and former != str(stored):
            # The one before is kept: it is resumed from if the newest proves to be damaged.
            self._older, oldest = former, self._older
            if oldest:
                manifest.remove(self._storage, StoredFolder.parse(oldest).prefix)

    def _keep_checkpoint(self, saved: protocol.CheckpointSaved, metrics: dict[str, Any]) -> None:
        # An attempt that resumed before this epoch's end finds its predecessor's checkpoint, which is as good.
        job_id = self._keeper.lease.job_id
        if self._keeper.write(lambda session: kept_checkpoints.has_step(session, job_id, saved.step)):
            return
        prefix = f"{self.prefix}/{saved.path}"
        listed = self.publish(saved.path, prefix)
        self._keeper.write(lambda session: self._record_checkpoint(session, saved.step, prefix, listed, metrics))
        for old in self._keeper.write(
            lambda session: kept_checkpoints.hide_old(session, self._keeper.lease, self._keep)
        ):
            manifest.remove(self._storage, old)

    def _record_checkpoint(
        self, session: Session, step: int, prefix: str, listed: Manifest, metrics: dict[str, Any]
    ) -> None:
        job = leases.held(session, self._keeper.lease)
        model = add_model(session, job, self._settings, prefix=prefix, listed=listed, step=step)
        data = {"step": step} | _event_data(metrics)
        leases.record_checkpoint(session, self._keeper.lease, step=step, model_id=model.id, metrics=data)


def add_model(
    session: Session, job: Job, settings: Settings, *, prefix: str, listed: Manifest, step: int | None = None
) -> Model:
    """Adds the rows of a job's model and its files: a checkpoint if `step` is given, else the result.

    Checkpoints are made before the gate; in a job with a gate they are withheld until its verdict.
    """
    base = session.get_one(Model, job.base_model)
    name = registry.tuned_name(base=job.base_name, organization=settings.organization, suffix=job.suffix, step=step)
    model = registry.add_tuned(
        session,
        name=name,
        project_id=job.project_id,
        kind="tuned" if step is None else "checkpoint",
        base=base,
        job_id=job.id,
        technique=(job.plan or {})["technique"]["type"],
        prefix=prefix,
        manifest=listed.model_dump(mode="json"),
        sha256=listed.sha256,
        withheld=job.withholds_model or (step is not None and (job.plan or {}).get("gate") is not None),
    )
    artifacts.record(session, model, listed)
    return model


def _event_data(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that a step's event shows: OpenAI's keys, and the method's own with the same prefixes."""
    return {
        name: value for name, value in values.items() if name.startswith(("train_", "valid_", "full_valid_", "task_"))
    }


def step_message(step: int, total: int | None, values: dict[str, Any]) -> str:
    """`Step 300/300: training loss=0.15, validation loss=0.27, full validation loss=0.40`, as far as measured."""
    names = {"train_loss": "training loss", "valid_loss": "validation loss", "full_valid_loss": "full validation loss"}
    parts = [f"{words}={values[key]:.2f}" for key, words in names.items() if key in values]
    return f"Step {step}/{total}: {', '.join(parts)}" if parts else f"Step {step}/{total}"


def task_message(evaluated: protocol.Evaluated) -> str:
    return (
        f"Step {evaluated.step}: {evaluated.task_metric} {evaluated.task_score:.1%} on {evaluated.task_rows} "
        "validation rows"
    )


def parameters_message(started: protocol.Started) -> str:
    percent = 100 * started.trainable_params / max(1, started.all_params)
    message = (
        f"trainable params: {started.trainable_params:,} || all params: {started.all_params:,} || "
        f"trainable: {percent:.2f}%"
    )
    if started.learning_share is not None:
        message += f" || adapted or trained linear weights: {started.learning_share:.1%}"
    if started.quantised_share is not None:
        message += f", in four bits: {started.quantised_share:.1%}"
    return message


def score_message(score: protocol.Score) -> str:
    exact = protocol.Measure(
        base=score.base_exact, tuned=score.tuned_exact, gain=score.gain, low=score.gain_low, high=score.gain_high
    )
    found = {} if score.task == "preferences" else {"exact match": exact}
    found |= {name: found for name, found in score.metrics.items() if name != "exact"}
    return f"Scorecard on {score.rows} test rows: " + "; ".join(map(_measure_message, found, found.values()))


def _measure_message(name: str, found: protocol.Measure) -> str:
    return (
        f"{name} {found.base:.1%} before, {found.tuned:.1%} after, gain {100 * found.gain:+.1f} points "
        f"(95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f})"
    )
