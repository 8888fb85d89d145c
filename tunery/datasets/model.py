"""Files as the Files API knows them, and Uploads that become files part by part."""

from datetime import datetime

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index
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
