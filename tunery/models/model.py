"""Tables of models: registered bases, and the results of jobs."""

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base, creation_time


class Model(Base):
    """A base (`project_id` null: everyone's), a job's result or one of its checkpoints.

    Its files are in storage under `prefix`, listed by `manifest` (sizes and sha256; see `artifacts.manifest`).
    `model_info` holds what planning needs: hidden_size, layers, params, context_length, ...
    `withheld`: the job's gate keeps the stored model from use until the job's owner publishes it.
    `purged_at`: when the objects of a deleted model were removed.
    `export`: the last requested one (see `exports`). `scoring`: the last scorecard (see `scores`).
    `chat_template`: Jinja text that replaces a base's own template.
    """

    __tablename__ = "models"
    __table_args__ = (
        CheckConstraint("kind IN ('base', 'tuned', 'checkpoint')", name="kind"),
        CheckConstraint("status IN ('processing', 'ready', 'error')", name="status"),
        CheckConstraint("(kind = 'base') = (project_id IS NULL)", name="bases_are_shared"),
        CheckConstraint("kind = 'base' OR base_id IS NOT NULL", name="tuned_has_base"),
        CheckConstraint("status <> 'ready' OR manifest_sha256 IS NOT NULL", name="ready_has_manifest"),
        Index("ix_models_project_created", "project_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str | None] = mapped_column(ForeignKey("projects.id"))
    kind: Mapped[str]
    source: Mapped[str | None] = mapped_column(index=True)
    chat_template: Mapped[str | None]
    base_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    job_id: Mapped[str | None] = mapped_column(index=True)
    technique: Mapped[str | None]
    status: Mapped[str] = mapped_column(default="processing")
    status_details: Mapped[str | None]
    prefix: Mapped[str]
    manifest: Mapped[dict[str, Any] | None]
    manifest_sha256: Mapped[str | None]
    model_info: Mapped[dict[str, Any]] = mapped_column("facts", default=dict)
    created_at: Mapped[datetime] = creation_time()
    export: Mapped[dict[str, Any] | None]
    scoring: Mapped[dict[str, Any] | None]
    withheld: Mapped[bool] = mapped_column(default=False, server_default="false")
    deleted_at: Mapped[datetime | None]
    purged_at: Mapped[datetime | None]


class Alias(Base):
    """Another name of a base, with which existing code runs unchanged."""

    __tablename__ = "model_aliases"

    alias: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    created_at: Mapped[datetime] = creation_time()
