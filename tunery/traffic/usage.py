"""Tokens that a project has used, by model and day."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from tunery.traffic.model import ModelUsage


@dataclass(frozen=True)
class Tokens:
    """The tokens of one answered request."""

    prompt: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion


def count(session: Session, project_id: str, model_id: str, tokens: Tokens) -> None:
    """Adds one request to the day's usage."""
    new = insert(ModelUsage).values(
        project_id=project_id,
        model_id=model_id,
        day=datetime.now(UTC).date(),
        requests=1,
        prompt_tokens=tokens.prompt,
        completion_tokens=tokens.completion,
    )
    names = ("requests", "prompt_tokens", "completion_tokens")
    added = {name: getattr(ModelUsage, name) + new.excluded[name] for name in names}
    session.execute(new.on_conflict_do_update(index_elements=["project_id", "day", "model_id"], set_=added))


def list_days(
    session: Session, project_id: str, *, first: date, before: date, models: Sequence[str] | None = None
) -> list[ModelUsage]:
    """Returns the project's usage from one day to the day before another, oldest first."""
    query = (
        select(ModelUsage)
        .where(ModelUsage.project_id == project_id, ModelUsage.day >= first, ModelUsage.day < before)
        .order_by(ModelUsage.day, ModelUsage.model_id)
    )
    return list(session.scalars(query if models is None else query.where(ModelUsage.model_id.in_(models))))
