"""Tables of jobs: their attempts, events, metrics, checkpoints and devices."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Identity, Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY, INTEGER
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base, creation_time
from tunery.jobs.states import FINAL, State


def _quoted(states: frozenset[State]) -> str:
    return ", ".join(f"'{state}'" for state in sorted(states))


_MEASURED = text("state = 'succeeded' AND jsonb_typeof(actual -> 'kept') = 'object'")


class Job(Base):
    """One request for a fine-tune, from `submit` to a final state. The row is the queue.

    `fence` grows with every claim and every cancellation; an attempt may write only while the job's fence equals its
    number. `pause_requested` is `pause` while the owner waits for a running job to stop; `phase` says what a running
    job is doing. `base_alias` is the alias by which the request, or that of its parent model, named the base.
    `gpu_bytes` is the memory it needs on each of its `gpus`, `cpu_bytes` on a host that trains on its CPU (null: it
    cannot train there). `failures` counts attempts that crashed, `losses` those whose worker was lost, both since the
    last snapshot with progress (`snapshot_step`); `validations` counts how often its validation began. Until
    `reserved_until`, `reserved_host` takes no smaller job. `storage_cleaned`: objects in storage that the ended job
    made and no row names are deleted. `removed_records`: kinds of its records (`events`, `metrics`, `logs`) that were
    removed because of their age. `gate`: the gate's verdict on its model, with `published`: who published a withheld
    model and why; `served`: the same for the check of the served model. `quote`: the expected time and cost,
    `actual`: the measured ones, with the data for later quotes (`jobs.quoting`); both are null in jobs of older
    releases.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"state IN ({_quoted(frozenset(State))})", name="state"),
        CheckConstraint(f"(state IN ({_quoted(FINAL)})) = (finished_at IS NOT NULL)", name="final_is_finished"),
        CheckConstraint("state <> 'failed' OR error_code IS NOT NULL", name="failed_has_error"),
        CheckConstraint("state <> 'succeeded' OR tuned_model IS NOT NULL", name="succeeded_has_model"),
        CheckConstraint("state NOT IN ('queued', 'running') OR plan IS NOT NULL", name="queued_has_plan"),
        CheckConstraint("wish IS NULL OR (wish = 'pause' AND state = 'running')", name="wish"),
        CheckConstraint("gpus IN (1, 2, 4, 8)", name="gpus"),
        UniqueConstraint("project_id", "idempotency_key"),
        Index("ix_jobs_project_created", "project_id", "created_at", "id"),
        Index("ix_jobs_queued", "project_id", "priority", "queued_at", postgresql_where="state = 'queued'"),
        Index("ix_jobs_validating", "created_at", postgresql_where="state = 'validating_files'"),
        Index("ix_jobs_request", "project_id", "request_sha256", "created_at"),
        Index("ix_jobs_untidied", "finished_at", postgresql_where="finished_at IS NOT NULL AND NOT tidied"),
        # Finds the runs that quotes are based on, by device, newest first.
        Index("ix_jobs_measured", text("(actual ->> 'device')"), "finished_at", postgresql_where=_MEASURED),
        Index("ix_jobs_training_file", "training_file"),
        Index("ix_jobs_validation_file", "validation_file"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    state: Mapped[str] = mapped_column(default=State.VALIDATING)
    phase: Mapped[str | None]
    pause_requested: Mapped[str | None] = mapped_column("wish")
    fence: Mapped[int] = mapped_column(BigInteger, default=0)
    failures: Mapped[int] = mapped_column(default=0)
    losses: Mapped[int] = mapped_column(default=0, server_default="0")
    validations: Mapped[int] = mapped_column(default=0, server_default="0")
    priority: Mapped[int] = mapped_column(default=0)
    gpus: Mapped[int] = mapped_column(default=1)
    gpu_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    cpu_bytes: Mapped[int | None] = mapped_column(BigInteger, default=0)
    reserved_host: Mapped[str | None]
    reserved_until: Mapped[datetime | None]

    base_model: Mapped[str] = mapped_column(ForeignKey("models.id"))
    base_alias: Mapped[str | None]
    parent_model: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    tuned_model: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    test_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    result_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    spec: Mapped[dict[str, Any]]
    plan: Mapped[dict[str, Any] | None]
    suffix: Mapped[str | None]
    user_metadata: Mapped[dict[str, Any] | None]
    integrations: Mapped[list[Any]] = mapped_column(default=list)
    rerun_of: Mapped[str | None]
    template_time: Mapped[datetime | None]
    inputs: Mapped[dict[str, Any] | None]
    method_given: Mapped[bool] = mapped_column("names_method", default=True)
    """Read nowhere; the column is NOT NULL and has no default in the database, so a new row still needs a value."""

    idempotency_key: Mapped[str | None]
    request_sha256: Mapped[str]
    created_at: Mapped[datetime] = creation_time()
    queued_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    estimated_finish: Mapped[datetime | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)
    scorecard: Mapped[dict[str, Any] | None]
    gate: Mapped[dict[str, Any] | None]
    served: Mapped[dict[str, Any] | None]
    quote: Mapped[dict[str, Any] | None]
    actual: Mapped[dict[str, Any] | None]
    snapshot: Mapped[str | None]
    snapshot_step: Mapped[int | None]
    storage_cleaned: Mapped[bool] = mapped_column("tidied", default=False)
    removed_records: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list, server_default="{}")
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    error_param: Mapped[str | None]

    @property
    def replay_file(self) -> str | None:
        """The file of general rows for replay; None without replay, or where the base itself answers prompts for it."""
        source = (self.spec.get("replay") or {}).get("source", "self")
        return None if source == "self" else str(source)

    @property
    def base_name(self) -> str:
        """The base's name in API answers and in names of tuned models: the requested alias, or its id."""
        return self.base_alias or self.base_model

    @property
    def now(self) -> datetime:
        """The time that chat templates see as now, the same in every attempt and every rerun."""
        return self.template_time or self.created_at

    @property
    def withholds_model(self) -> bool:
        """Whether the gate or the check of the served model withholds the job's model and nobody has published it."""
        verdicts = (self.gate, self.served)
        return any(found is not None and found["withheld"] and "published" not in found for found in verdicts)

    @property
    def model_name(self) -> str:
        """The model that the job starts from, as the request named it."""
        return self.parent_model or self.base_name


class Attempt(Base):
    """One attempt of one worker. It is live while it holds a lease; a job has at most one live attempt."""

    __tablename__ = "attempts"
    __table_args__ = (
        UniqueConstraint("job_id", "number"),
        CheckConstraint("(ended_at IS NULL) = (lease_until IS NOT NULL)", name="live_is_leased"),
        CheckConstraint("(ended_at IS NULL) = (outcome IS NULL)", name="ended_has_outcome"),
        Index("uq_attempts_live", "job_id", unique=True, postgresql_where="ended_at IS NULL"),
        Index("ix_attempts_lease", "lease_until", postgresql_where="ended_at IS NULL"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    number: Mapped[int] = mapped_column(BigInteger)
    host: Mapped[str]
    slot: Mapped[str]
    gpu_indexes: Mapped[list[int]] = mapped_column(ARRAY(INTEGER))
    started_at: Mapped[datetime] = creation_time()
    lease_until: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None]
    last_step: Mapped[int] = mapped_column(default=0)
    process: Mapped[dict[str, Any] | None]


class JobEvent(Base):
    """An event of a job, ordered by `seq`: for the events endpoint, the audit trail and the webhooks' outbox.

    `outcome` is set only on the event that ends a job; the outbox fans those out.
    """

    __tablename__ = "job_events"
    __table_args__ = (
        CheckConstraint("level IN ('info', 'warn', 'error')", name="level"),
        CheckConstraint("type IN ('message', 'metrics')", name="type"),
        Index("ix_job_events_job", "job_id", "seq"),
        Index("uq_job_events_outcome", "job_id", unique=True, postgresql_where="outcome IS NOT NULL"),
        Index("ix_job_events_outbox", "seq", postgresql_where="outcome IS NOT NULL AND NOT fanned_out"),
    )

    seq: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime] = creation_time()
    level: Mapped[str] = mapped_column(default="info")
    type: Mapped[str] = mapped_column(default="message")
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]
    outcome: Mapped[str | None]
    fanned_out: Mapped[bool] = mapped_column(default=False)


class Metric(Base):
    """One step's measurements. An attempt that resumes overwrites the steps that it repeats."""

    __tablename__ = "job_metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    values: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = creation_time()


class Checkpoint(Base):
    """A public checkpoint: a usable model from the end of an epoch. Recovery snapshots are in `jobs.snapshot`."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"), Index("ix_checkpoints_job", "job_id", "step"))

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int]
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = creation_time()


class HostDevice(Base):
    """A device that a worker offers, as last seen. `gpu_index` null: the host's CPU.

    `stopped_at`: when a worker that was stopped last took it back; another worker of the host may have shown it since.
    """

    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str] = mapped_column(index=True)
    gpu_index: Mapped[int | None]
    device: Mapped[str]
    memory_bytes: Mapped[int] = mapped_column(BigInteger)
    bf16: Mapped[bool] = mapped_column(default=True)
    seen_at: Mapped[datetime] = creation_time()
    stopped_at: Mapped[datetime | None]
