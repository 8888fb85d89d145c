"""Files as the Files API knows them, their reports, and Uploads that become files part by part."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Identity, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base, creation_time


class File(Base):
    """One stored object. `deleted_at` hides it from its project; its bytes go with the last job that needs them, at
    `purged_at`."""

    __tablename__ = "files"
    __table_args__ = (
        CheckConstraint("status IN ('uploaded', 'processed', 'error')", name="status"),
        Index("ix_files_project_created", "project_id", "created_at", "id"),
        Index("ix_files_unprocessed", "created_at", postgresql_where="status = 'uploaded'"),
        Index("ix_files_purgeable", "created_at", postgresql_where="deleted_at IS NOT NULL AND purged_at IS NULL"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    purpose: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    key: Mapped[str]
    status: Mapped[str] = mapped_column(default="uploaded")
    status_details: Mapped[str | None]
    created_at: Mapped[datetime] = creation_time()
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    purged_at: Mapped[datetime | None]


class FileReport(Base):
    """What a worker finds in a content of a project's files: every file with these bytes has the same report.

    `base` is the model whose tokenizer counts, `against` the sha256 of the content that it is compared with; both are
    empty for the report that every file gets. `tries` counts the workers that began it and is their fence.
    """

    __tablename__ = "file_reports"
    __table_args__ = (
        UniqueConstraint("project_id", "sha256", "base", "against"),
        CheckConstraint("status IN ('queued', 'running', 'ready', 'failed')", name="status"),
        Index("ix_file_reports_waiting", "created_at", postgresql_where="status IN ('queued', 'running')"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    sha256: Mapped[str]
    base: Mapped[str] = mapped_column(default="")
    against: Mapped[str] = mapped_column(default="")
    version: Mapped[int]
    status: Mapped[str] = mapped_column(default="queued")
    progress: Mapped[float] = mapped_column(default=0.0)
    tries: Mapped[int] = mapped_column(default=0)
    summary: Mapped[dict[str, Any] | None]
    error: Mapped[str | None]
    created_at: Mapped[datetime] = creation_time()
    finished_at: Mapped[datetime | None]

    @property
    def prefix(self) -> str:
        """Where the report's objects lie."""
        return f"reports/{self.id}"


class FileEvent(Base):
    """A file's report is there: what the webhooks' outbox sends. `outcome`: `processed`, or `failed` where no job
    can be made of the file."""

    __tablename__ = "file_events"
    __table_args__ = (
        CheckConstraint("outcome IN ('processed', 'failed')", name="outcome"),
        Index("ix_file_events_outbox", "seq", postgresql_where="NOT fanned_out"),
    )

    seq: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    file_id: Mapped[str] = mapped_column(ForeignKey("files.id"), unique=True)
    created_at: Mapped[datetime] = creation_time()
    outcome: Mapped[str]
    data: Mapped[dict[str, Any] | None]
    fanned_out: Mapped[bool] = mapped_column(default=False)


class FileCleaning(Base):
    """How a file came of another one: asked for in `order`, done by a worker, described in `outcome` (the lineage, with
    each row that went or was changed). `held_out_id`: the file of the rows that were held out; `base_id`: the model
    whose tokenizer counts."""

    __tablename__ = "file_cleanings"

    file_id: Mapped[str] = mapped_column(ForeignKey("files.id"), primary_key=True)
    source_id: Mapped[str] = mapped_column(ForeignKey("files.id"))
    against_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    held_out_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"), unique=True)
    base_id: Mapped[str | None]
    order: Mapped[dict[str, Any]]
    outcome: Mapped[dict[str, Any] | None]
    tries: Mapped[int] = mapped_column(default=0)
    progress: Mapped[float] = mapped_column(default=0.0, server_default="0")
    created_at: Mapped[datetime] = creation_time()


class Upload(Base):
    """A file on its way. The bytes lie in its parts until `complete` joins them."""

    __tablename__ = "uploads"
    __table_args__ = (CheckConstraint("status IN ('pending', 'completed', 'cancelled', 'expired')", name="status"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    purpose: Mapped[str]
    filename: Mapped[str]
    mime_type: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[str] = mapped_column(default="pending")
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    file_expires_after: Mapped[int | None]
    created_at: Mapped[datetime] = creation_time()
    expires_at: Mapped[datetime]


class UploadPart(Base):
    """One part's bytes, in storage under `key`."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    key: Mapped[str]
    created_at: Mapped[datetime] = creation_time()
