"""What a project asks of models: what is left of its rates, and what it has used."""

from datetime import date, datetime

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base


class RequestRate(Base):
    """What a project could still ask for at `at`; both counts grow from then on, up to their limit. Tokens can be
    below zero: an answer was longer than its request let expect."""

    __tablename__ = "request_rates"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    requests_left: Mapped[float]
    tokens_left: Mapped[float]
    at: Mapped[datetime]


class ModelUsage(Base):
    """The requests of a project to a model on one day (UTC), and their tokens. The model may have been deleted since,
    so its id is no foreign key."""

    __tablename__ = "model_usage"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
