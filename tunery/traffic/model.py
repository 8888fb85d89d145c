"""Tables of a project's requests to models: rates, usage and captured requests."""

from datetime import date, datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base, creation_time


class RequestRate(Base):
    """The requests and tokens that a project had left at `at`; both grow from then on, up to their limit. Tokens can be
    negative if an answer was longer than expected."""

    __tablename__ = "request_rates"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    requests_left: Mapped[float]
    tokens_left: Mapped[float]
    at: Mapped[datetime]


class ModelUsage(Base):
    """The requests of a project to a model on one day (UTC), and their tokens. The model may have been deleted since,
    so its id is not a foreign key."""

    __tablename__ = "model_usage"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)


class Capture(Base):
    """The setting that a project keeps its requests to a model, for some days. Without a row nothing is kept."""

    __tablename__ = "captures"
    __table_args__ = (CheckConstraint("keep_days BETWEEN 1 AND 365", name="keep_days"),)

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)
    keep_days: Mapped[int]
    created_at: Mapped[datetime] = creation_time()


class CapturedRequest(Base):
    """One answered request, without personal data and secrets. `id`: that of the answer, as the client got it.

    `rating`: 1 for a good answer, -1 for a bad one. `correction`: the message that should have been answered.
    """

    __tablename__ = "captured_requests"
    __table_args__ = (
        CheckConstraint("rating IN (-1, 1)", name="rating"),
        Index("ix_captured_requests_of_model", "project_id", "model_id", "created_at", "id"),
        Index("ix_captured_requests_expiry", "expires_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    model_id: Mapped[str]
    request: Mapped[dict[str, Any]]
    answer: Mapped[dict[str, Any]]
    finish_reason: Mapped[str]
    rating: Mapped[int | None]
    correction: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = creation_time()
    expires_at: Mapped[datetime]


class CapturedFile(Base):
    """How a file was made of captured requests: requested in `order`, described in `outcome` (the lineage)."""

    __tablename__ = "captured_files"

    file_id: Mapped[str] = mapped_column(ForeignKey("files.id"), primary_key=True)
    model_id: Mapped[str]
    order: Mapped[dict[str, Any]]
    outcome: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = creation_time()
