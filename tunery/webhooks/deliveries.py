"""What became of an endpoint's messages. The caller has checked that the endpoint belongs to the project."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from tunery.baselines.model import Baseline
from tunery.datasets.model import FileEvent
from tunery.jobs.model import JobEvent
from tunery.paging import page
from tunery.webhooks import outbox
from tunery.webhooks.model import Delivery, DeliveryTry, WebhookEndpoint


@dataclass(frozen=True)
class Delivered:
    """A delivery with its event's type, the id of the object that it is about, and its tries, the first one first."""

    delivery: Delivery
    event_type: str
    about: str
    tries: Sequence[DeliveryTry]


def list_page(
    session: Session, endpoint_id: str, *, after: str | None = None, limit: int = 20
) -> tuple[list[Delivered], bool]:
    """Returns one page, newest first, and whether more follow. Raises NotFound for an unknown `after`."""
    owned = select(Delivery).where(Delivery.endpoint_id == endpoint_id)
    by = (Delivery.created_at, Delivery.id)
    rows, more = page(session, owned, by=by, id=Delivery.id, kind="webhook delivery", after=after, limit=limit)
    return _with_events(session, rows), more


def latest(session: Session, endpoint_ids: Sequence[str]) -> dict[str, Delivered]:
    """Returns the newest delivery of each endpoint that has one, by the endpoint's id."""
    one = aliased(Delivery)
    newest = (
        select(one.id)
        .where(one.endpoint_id == WebhookEndpoint.id)
        .order_by(one.created_at.desc(), one.id.desc())
        .limit(1)
        .correlate(WebhookEndpoint)
        .scalar_subquery()
    )
    rows = select(Delivery).join(WebhookEndpoint, Delivery.id == newest).where(WebhookEndpoint.id.in_(endpoint_ids))
    return {found.delivery.endpoint_id: found for found in _with_events(session, session.scalars(rows).all())}


def _with_events(session: Session, rows: Sequence[Delivery]) -> list[Delivered]:
    tried = (
        select(DeliveryTry).where(DeliveryTry.delivery_id.in_([row.id for row in rows])).order_by(DeliveryTry.number)
    )
    tries: dict[str, list[DeliveryTry]] = {row.id: [] for row in rows}
    for one in session.scalars(tried):
        tries[one.delivery_id].append(one)
    events = _events(session, rows)
    found = [(row, events[row.event_id or row.file_event_id or row.baseline_id or ""]) for row in rows]
    return [Delivered(row, outbox.type_of(event), outbox.about(event), tries[row.id]) for row, event in found]


def _events(session: Session, rows: Sequence[Delivery]) -> dict[str, outbox.Event]:
    """Returns the events of deliveries by their ids, which differ in their prefixes."""
    events: list[outbox.Event] = []
    events += session.scalars(select(JobEvent).where(JobEvent.id.in_([row.event_id for row in rows])))
    events += session.scalars(select(FileEvent).where(FileEvent.id.in_([row.file_event_id for row in rows])))
    events += session.scalars(select(Baseline).where(Baseline.id.in_([row.baseline_id for row in rows])))
    return {event.id: event for event in events}
