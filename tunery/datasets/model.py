"""Tables of files, their reports and cleanings, and Uploads in parts."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Identity, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base, creation_time


class File(Base):
    """A stored file. `deleted_at` hides it from its project; its bytes are removed at `purged_at`, once no job needs
    them."""

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


_CONTENT = ("project_id", "sha256", "base", "against")


class FileReport(Base):
    """The report on a file content of a project; all files with the same bytes share it.

    `base` is the model whose tokenizer counts, `against` the sha256 of the content to compare with, `columns` those
    that were named by part; all are empty for the report that every file gets. `tries` counts the workers that began it
    and is their fencing token.
    """

    __tablename__ = "file_reports"
    __table_args__ = (
        # A digest, as an entry of an index is at most 2,704 bytes long and the names of columns may be longer.
        Index("uq_file_reports_content", *_CONTENT, text("md5(columns::text)"), unique=True),
        CheckConstraint("status IN ('queued', 'running', 'ready', 'failed')", name="status"),
        Index("ix_file_reports_waiting", "created_at", postgresql_where="status IN ('queued', 'running')"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    sha256: Mapped[str]
    base: Mapped[str] = mapped_column(default="")
    against: Mapped[str] = mapped_column(default="")
    columns: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")
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
        """The storage prefix of the report's objects."""
        return f"reports/{self.id}"


class FileEvent(Base):
    """The event of a finished file report, for the webhooks' outbox. `outcome`: `processed`, or `failed` if no job can
    use the file."""

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
    """The cleaning that made a file from another: requested in `order`, run by a worker, described in `outcome` (the
    lineage with each dropped or changed row). `held_out_id`: the file of the held-out rows; `base_id`: the model whose
    tokenizer counts."""

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
    """An unfinished file, sent in parts until `complete` joins them."""

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
