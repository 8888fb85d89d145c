"""Rates of a project's requests to models: token buckets in PostgreSQL, which all API processes share.

A bucket holds one minute's worth and is refilled continuously, so that a burst may take the whole minute at once and
a steady sender never waits.
"""

import math
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from tunery.keys.model import Project
from tunery.settings import Settings
from tunery.traffic.errors import RateLimited
from tunery.traffic.model import RequestRate


@dataclass(frozen=True)
class Bucket:
    """A token bucket with `left` of `limit` units per minute. Without a limit (None) it is never empty."""

    limit: int | None
    left: float = 0.0

    @classmethod
    def full(cls, limit: int | None) -> "Bucket":
        return cls(limit, float(limit or 0))

    def after(self, seconds: float) -> "Bucket":
        """Returns the bucket some time later."""
        return self if self.limit is None else replace(self, left=min(self.limit, self.left + self._gain(seconds)))

    def without(self, amount: float) -> "Bucket":
        """Returns the bucket after taking an amount; a negative amount is given back."""
        return self if self.limit is None else replace(self, left=min(self.limit, self.left - amount))

    def seconds_until(self, amount: float) -> float:
        """Returns the seconds until the amount can be taken; 0 if it can be taken now."""
        if self.limit is None or self.left >= amount:
            return 0.0
        return math.inf if self.limit == 0 else (amount - self.left) * 60 / self.limit

    def _gain(self, seconds: float) -> float:
        return max(0.0, seconds) * (self.limit or 0) / 60


@dataclass(frozen=True)
class Standing:
    """What a project has left. `charged`: the tokens that its last request was charged in advance."""

    requests: Bucket
    tokens: Bucket
    charged: float = 0.0


def take(session: Session, settings: Settings, project_id: str, tokens: int) -> Standing:
    """Takes one request and the tokens that it is expected to need. Raises RateLimited.

    A request that is expected to need more than a minute's tokens takes a full bucket, as it could never be sent
    otherwise, and the estimate may be too high.
    """
    project = session.get_one(Project, project_id)
    limits = _limits(settings, project)
    if limits == (None, None):
        return Standing(Bucket(None), Bucket(None))
    row, now, (requests, found) = _locked(session, project_id, limits)
    charged = min(tokens, limits[1]) if limits[1] is not None else 0
    for bucket, amount, unit in ((requests, 1, "requests"), (found, charged, "tokens")):
        if wait := bucket.seconds_until(amount):
            raise _refusal(Standing(requests, found), wait, unit, bucket.limit)
    standing = Standing(requests.without(1), found.without(charged), charged)
    _store(row, now, standing)
    session.flush()
    return standing


def charge_used(session: Session, settings: Settings, project_id: str, *, charged: float, used: int) -> None:
    """Replaces the tokens that were charged for a request by those that it used."""
    limits = _limits(settings, session.get_one(Project, project_id))
    if limits[1] is None or charged == used:
        return
    row, now, (requests, tokens) = _locked(session, project_id, limits)
    _store(row, now, Standing(requests, tokens.without(used - charged)))
    session.flush()


def _limits(settings: Settings, project: Project) -> tuple[int | None, int | None]:
    """Returns the limits of requests and tokens per minute: the project's own, else the settings'."""
    return tuple(  # type: ignore[return-value]  # of two
        common if own is None else own
        for own, common in (
            (project.requests_per_minute, settings.requests_per_minute),
            (project.tokens_per_minute, settings.tokens_per_minute),
        )
    )


def _locked(
    session: Session, project_id: str, limits: tuple[int | None, int | None]
) -> tuple[RequestRate, datetime, tuple[Bucket, Bucket]]:
    """Returns the project's row, locked for this transaction, and its buckets as of now."""
    new = {"project_id": project_id, "requests_left": limits[0] or 0, "tokens_left": limits[1] or 0}
    session.execute(insert(RequestRate).values(**new, at=func.clock_timestamp()).on_conflict_do_nothing())
    query = select(RequestRate).where(RequestRate.project_id == project_id).with_for_update()
    row = session.scalars(query, execution_options={"populate_existing": True}).one()
    now: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    seconds = (now - row.at).total_seconds()
    buckets = Bucket(limits[0], row.requests_left).after(seconds), Bucket(limits[1], row.tokens_left).after(seconds)
    return row, now, buckets


def _store(row: RequestRate, now: datetime, standing: Standing) -> None:
    row.requests_left, row.tokens_left, row.at = standing.requests.left, standing.tokens.left, now


def _refusal(standing: Standing, wait: float, unit: str, limit: int | None) -> RateLimited:
    # With a limit of 0 no wait helps; a day is longer than any client waits.
    seconds = math.ceil(min(wait, 86_400.0))
    return RateLimited(limit=limit, unit=unit, seconds=seconds, standing=standing)
