"""The table of baselines: prompting of a model, measured on a user's own task before any training."""

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base, creation_time


class Baseline(Base):
    """One measurement. The row is the queue. `order`: as asked for (see `ledger.Order`), without any key.

    `result`: the scores of each model, once they are measured. `tries` counts the workers that began it.
    `external_key`: the key of the external endpoint, encrypted; it goes when the baseline ends. `fanned_out`: the
    webhooks' outbox has seen its end.
    """

    __tablename__ = "baselines"
    __table_args__ = (
        CheckConstraint("status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="status"),
        CheckConstraint("(status IN ('queued', 'running')) = (finished_at IS NULL)", name="ended_is_finished"),
        CheckConstraint("finished_at IS NULL OR external_key IS NULL", name="ended_has_no_key"),
        Index("ix_baselines_project_created", "project_id", "created_at", "id"),
        Index("ix_baselines_outbox", "finished_at", postgresql_where="finished_at IS NOT NULL AND NOT fanned_out"),
        Index("ix_baselines_waiting", "created_at", postgresql_where="status IN ('queued', 'running')"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    model: Mapped[str] = mapped_column(ForeignKey("models.id"))
    eval_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    examples_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    order: Mapped[dict[str, Any]]
    external_key: Mapped[str | None]
    status: Mapped[str] = mapped_column(default="queued")
    progress: Mapped[float] = mapped_column(default=0.0)
    tries: Mapped[int] = mapped_column(default=0)
    result: Mapped[dict[str, Any] | None]
    error: Mapped[str | None]
    created_at: Mapped[datetime] = creation_time()
    finished_at: Mapped[datetime | None]
    fanned_out: Mapped[bool] = mapped_column(default=False, server_default="false")

    @property
    def prefix(self) -> str:
        """The storage prefix of the baseline's objects."""
        return f"baselines/{self.id}"
