"""Tables of projects, which own all other rows, and of their keys."""

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base, creation_time


class Project(Base):
    """A team's project. `max_running` caps its live attempts, `max_queued` its waiting jobs; null is no cap.

    `requests_per_minute` and `tokens_per_minute` limit its requests to models; null means the setting of that name.
    """

    __tablename__ = "projects"
    __table_args__ = (
        CheckConstraint("max_running >= 0", name="max_running"),
        CheckConstraint("max_queued >= 0", name="max_queued"),
        CheckConstraint("requests_per_minute >= 0", name="requests_per_minute"),
        CheckConstraint("tokens_per_minute >= 0", name="tokens_per_minute"),
        Index("uq_projects_live_name", "name", unique=True, postgresql_where="revoked_at IS NULL"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    max_running: Mapped[int | None]
    max_queued: Mapped[int | None]
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    created_at: Mapped[datetime] = creation_time()
    revoked_at: Mapped[datetime | None]


class Key(Base):
    """An API key: its SHA-256 and a hint to recognise it by, never the key itself."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    prefix: Mapped[str]
    sha256: Mapped[str] = mapped_column(unique=True)
    admin: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = creation_time()
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
