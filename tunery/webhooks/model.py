"""Tables of webhook endpoints, deliveries and their tries."""

from datetime import datetime

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Identity, Index, Text, UniqueConstraint
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base, creation_time


class WebhookEndpoint(Base):
    """A receiver. While `previous_secret` is valid, every message carries the signatures of both secrets.

    Secrets are stored in plain text, as signing needs the secret itself and not a digest.
    """

    __tablename__ = "webhook_endpoints"
    __table_args__ = (
        CheckConstraint("(previous_secret IS NULL) = (previous_valid_until IS NULL)", name="previous_has_end"),
        CheckConstraint("(disabled_at IS NULL) = (disabled_reason IS NULL)", name="disabled_has_reason"),
        CheckConstraint("cardinality(event_types) > 0", name="event_types"),
        Index("ix_webhook_endpoints_project_created", "project_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[str]] = mapped_column(ARRAY(Text))
    secret: Mapped[str]
    previous_secret: Mapped[str | None]
    previous_valid_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = creation_time()
    updated_at: Mapped[datetime] = creation_time()
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]
    deleted_at: Mapped[datetime | None]


class Delivery(Base):
    """One event for one endpoint. Its id is the `webhook-id` header, the same on every try.

    `tries` counts the tries begun and is the fencing token: a sender writes only while it equals the number it took.
    `claimed_until` is set while a sender holds the row, and expires if the sender dies.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        UniqueConstraint("event_id", "endpoint_id"),
        UniqueConstraint("file_event_id", "endpoint_id"),
        UniqueConstraint("baseline_id", "endpoint_id"),
        CheckConstraint("num_nonnulls(event_id, file_event_id, baseline_id) = 1", name="one_event"),
        CheckConstraint("state IN ('pending', 'delivered', 'failed')", name="state"),
        CheckConstraint("(state = 'pending') = (next_try_at IS NOT NULL)", name="pending_has_next_try"),
        CheckConstraint("(state = 'pending') = (finished_at IS NULL)", name="finished_has_time"),
        Index("ix_webhook_deliveries_due", "next_try_at", postgresql_where="state = 'pending'"),
        Index("ix_webhook_deliveries_endpoint", "endpoint_id", "created_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    event_id: Mapped[str | None] = mapped_column(ForeignKey("job_events.id"))
    file_event_id: Mapped[str | None] = mapped_column(ForeignKey("file_events.id"))
    baseline_id: Mapped[str | None] = mapped_column(ForeignKey("baselines.id"))
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"))
    state: Mapped[str] = mapped_column(default="pending")
    tries: Mapped[int] = mapped_column(default=0)
    next_try_at: Mapped[datetime | None]
    claimed_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = creation_time()
    finished_at: Mapped[datetime | None]


class DeliveryTry(Base):
    """One try, written when it begins. A row without an end belongs to a running sender or one that died."""

    __tablename__ = "webhook_tries"
    __table_args__ = (UniqueConstraint("delivery_id", "number"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    delivery_id: Mapped[str] = mapped_column(ForeignKey("webhook_deliveries.id"))
    number: Mapped[int]
    at: Mapped[datetime] = creation_time()
    seconds: Mapped[float | None]
    status_code: Mapped[int | None]
    error: Mapped[str | None]
