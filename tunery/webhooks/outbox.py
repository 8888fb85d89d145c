"""From a job's end, a file's report or a baseline's end to its receivers: `job_events`, `file_events` and ended
`baselines` are the outbox, a delivery is one event for one endpoint.

Delivery is at least once, in no order. A sender that dies after its POST leaves the delivery claimed; when the claim
expires the message is sent again with the same `webhook-id`, by which receivers recognise duplicates.
"""

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Select, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, aliased

from tunery import db, ids
from tunery.baselines.model import Baseline
from tunery.datasets.model import File, FileEvent
from tunery.jobs.model import Job, JobEvent
from tunery.settings import Settings
from tunery.webhooks import messages
from tunery.webhooks.addresses import Resolver, resolve
from tunery.webhooks.endpoints import secrets_of
from tunery.webhooks.messages import Message
from tunery.webhooks.model import Delivery, DeliveryTry, WebhookEndpoint
from tunery.webhooks.posting import Answer

Event = JobEvent | FileEvent | Baseline
"""A baseline ends once, so its row is the event."""
Transaction = Callable[[], AbstractContextManager[Session]]

DELAYS = (0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Seconds before the first, second, ... try; the last one is made 75 hours after the event."""
SENDERS = 8
PER_ENDPOINT = 2
"""Concurrent deliveries to one endpoint, so that one that hangs cannot occupy every sender."""
_CLAIM = timedelta(seconds=60)
"""Longer than a POST may take, so that two senders never send the same delivery."""
_EVENTS = 500
_GONE = 410


def fan_out(session: Session) -> int:
    """Makes deliveries of new events for the endpoints that subscribed; returns how many.

    Safe to run concurrently: an event is taken by one caller, and (event, endpoint) is unique.
    """
    jobs = select(JobEvent).where(JobEvent.outcome.is_not(None), ~JobEvent.fanned_out).order_by(JobEvent.seq)
    files = select(FileEvent).where(~FileEvent.fanned_out).order_by(FileEvent.seq)
    ended = Baseline.finished_at.is_not(None)
    baselines = select(Baseline).where(ended, ~Baseline.fanned_out).order_by(Baseline.finished_at)
    events: list[Event] = []
    for query in (jobs, files, baselines):
        events += session.scalars(query.limit(_EVENTS).with_for_update(skip_locked=True)).all()
    owed = [row for event in events for row in _owed(session, event)]
    made = 0
    if owed:
        statement = insert(Delivery).values(owed).on_conflict_do_nothing().returning(Delivery.id)
        made = len(session.scalars(statement).all())
    for event in events:
        event.fanned_out = True
    session.flush()
    return made


def type_of(event: Event) -> str:
    """Returns the event's type, as endpoints subscribe to it."""
    if isinstance(event, Baseline):
        return messages.baseline_event_type(event.status)
    return (messages.file_event_type if isinstance(event, FileEvent) else messages.event_type)(event.outcome or "")


def about(event: Event) -> str:
    """Returns the id of the job, file or baseline that the event is about."""
    if isinstance(event, Baseline):
        return event.id
    return event.file_id if isinstance(event, FileEvent) else event.job_id


def _at(event: Event) -> datetime:
    """Returns the event's time."""
    return (event.finished_at or event.created_at) if isinstance(event, Baseline) else event.created_at


def _project(event: Event) -> Select[str]:
    if isinstance(event, Baseline):
        return select(Baseline.project_id).where(Baseline.id == event.id)
    if isinstance(event, FileEvent):
        return select(File.project_id).where(File.id == event.file_id)
    return select(Job.project_id).where(Job.id == event.job_id)


def _owed(session: Session, event: Event) -> list[dict[str, object]]:
    receivers = session.scalars(
        select(WebhookEndpoint.id)
        .where(WebhookEndpoint.project_id == _project(event).scalar_subquery())
        .where(WebhookEndpoint.created_at <= _at(event))
        .where(WebhookEndpoint.deleted_at.is_(None), WebhookEndpoint.disabled_at.is_(None))
        .where(WebhookEndpoint.event_types.contains([type_of(event)]))
    )
    column = {JobEvent: "event_id", FileEvent: "file_event_id", Baseline: "baseline_id"}[type(event)]
    none = dict.fromkeys(("event_id", "file_event_id", "baseline_id"))
    return [
        {
            "id": ids.new(ids.WEBHOOK_DELIVERY),
            **none,
            column: event.id,
            "endpoint_id": receiver,
            "state": "pending",
            "tries": 0,
            "next_try_at": func.clock_timestamp(),
        }
        for receiver in receivers
    ]


def deliver_due(
    settings: Settings,
    *,
    transaction: Transaction = db.transaction,
    resolver: Resolver = resolve,
    seconds: float = 30,
) -> int:
    """Fans out and sends until nothing is due; returns the number of tries. Safe to run concurrently.

    No transaction is open during a POST. Slow receivers do not delay messages to others; after `seconds` no further
    message is started, so that a stopping worker need not wait for a long queue.
    """
    made, flying = 0, set[Future[None]]()
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(SENDERS, "tunery-webhook") as pool:
        while True:
            with transaction() as session:
                fan_out(session)
                claims = _claim(session, SENDERS - len(flying)) if time.monotonic() < deadline else []
            made += len(claims)
            flying |= {pool.submit(_try, claim, settings, transaction, resolver) for claim in claims}
            if not flying:
                return made
            done, flying = wait(flying, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()


@dataclass(frozen=True)
class _Claim:
    """A delivery claimed for _CLAIM, as try number `number`."""

    delivery_id: str
    endpoint_id: str
    number: int
    message: Message


def _claim(session: Session, most: int) -> list[_Claim]:
    _drop_unwanted(session)
    claims: list[_Claim] = []
    for delivery, endpoint, event in _due(session, most):
        if sum(claim.endpoint_id == endpoint.id for claim in claims) < PER_ENDPOINT:
            claims.append(_begin(session, delivery, endpoint, event))
    session.flush()
    return claims


def _drop_unwanted(session: Session) -> None:
    """Ends deliveries to deleted or disabled endpoints."""
    session.execute(
        update(Delivery)
        .where(Delivery.state == "pending", Delivery.endpoint_id == WebhookEndpoint.id)
        .where(or_(WebhookEndpoint.deleted_at.is_not(None), WebhookEndpoint.disabled_at.is_not(None)))
        .values(state="failed", next_try_at=None, claimed_until=None, finished_at=func.clock_timestamp())
        .execution_options(synchronize_session=False)
    )


def _due(session: Session, most: int) -> Sequence[tuple[Delivery, WebhookEndpoint, Event]]:
    other = aliased(Delivery)
    now = func.clock_timestamp()
    on_their_way = (
        select(func.count())
        .where(other.endpoint_id == Delivery.endpoint_id, other.state == "pending", other.claimed_until > now)
        .scalar_subquery()
    )
    rows = session.execute(
        select(Delivery, WebhookEndpoint, JobEvent, FileEvent, Baseline)
        .join(WebhookEndpoint, WebhookEndpoint.id == Delivery.endpoint_id)
        .outerjoin(JobEvent, JobEvent.id == Delivery.event_id)
        .outerjoin(FileEvent, FileEvent.id == Delivery.file_event_id)
        .outerjoin(Baseline, Baseline.id == Delivery.baseline_id)
        .where(Delivery.state == "pending", Delivery.next_try_at <= now)
        .where(Delivery.claimed_until.is_(None) | (Delivery.claimed_until <= now))
        .where(on_their_way < PER_ENDPOINT)
        .order_by(Delivery.next_try_at)
        .limit(most)
        .with_for_update(skip_locked=True, of=Delivery)
    )
    return [(row.Delivery, row.WebhookEndpoint, row.JobEvent or row.FileEvent or row.Baseline) for row in rows]


def _begin(session: Session, delivery: Delivery, endpoint: WebhookEndpoint, event: Event) -> _Claim:
    now = db.now(session)
    delivery.tries += 1
    delivery.claimed_until = now + _CLAIM
    session.add(DeliveryTry(delivery_id=delivery.id, number=delivery.tries))
    message = Message(delivery.id, endpoint.url, secrets_of(endpoint, now), _body(session, event))
    return _Claim(delivery.id, endpoint.id, delivery.tries, message)


def _body(session: Session, event: Event) -> bytes:
    named = (messages.event_id(event.id), type_of(event), _at(event))
    if isinstance(event, Baseline):
        return messages.encode(*named, event.id)
    if isinstance(event, FileEvent):
        return messages.encode(*named, event.file_id, report=event.data)
    # Not later actions of the job's owner, as a repeated try must have the same content.
    found = select(Job.gate, Job.served, Job.scorecard).where(Job.id == event.job_id)
    gate, served, card = session.execute(found).one()
    return messages.encode(*named, event.job_id, scorecard=card, verdicts={"gate": gate, "served": served})


def _try(claim: _Claim, settings: Settings, transaction: Transaction, resolver: Resolver) -> None:
    answer = messages.send(claim.message, settings.webhook_allow, resolver=resolver)
    with transaction() as session:
        _record(session, claim, answer)


def _record(session: Session, claim: _Claim, answer: Answer) -> None:
    """Stores a try's result, and the delivery's next step unless another sender has taken it over."""
    session.execute(
        update(DeliveryTry)
        .where(DeliveryTry.delivery_id == claim.delivery_id, DeliveryTry.number == claim.number)
        .values(seconds=answer.seconds, status_code=answer.status_code, error=answer.error)
        .execution_options(synchronize_session=False)
    )
    session.execute(
        update(Delivery)
        .where(Delivery.id == claim.delivery_id, Delivery.tries == claim.number, Delivery.state == "pending")
        .values(**_next_step(claim, answer), claimed_until=None)
        .execution_options(synchronize_session=False)
    )
    if answer.status_code == _GONE:
        _disable(session, claim.endpoint_id, claim.message.url)


def _next_step(claim: _Claim, answer: Answer) -> dict[str, object]:
    now = func.clock_timestamp()
    if answer.accepted:
        return {"state": "delivered", "next_try_at": None, "finished_at": now}
    if answer.status_code == _GONE or claim.number >= len(DELAYS):
        return {"state": "failed", "next_try_at": None, "finished_at": now}
    return {"next_try_at": now + timedelta(seconds=delay_after(claim.number, answer.retry_after))}


def delay_after(tries: int, retry_after: float | None = None) -> float:
    """Returns the seconds from the `tries`th try, which failed, to the next: the schedule's plus up to 20 % jitter, so
    that receivers that failed together are not retried together; at least what the receiver asked for."""
    return max(DELAYS[tries] * random.uniform(1, 1.2), retry_after or 0)  # noqa: S311 (no secret)


def _disable(session: Session, endpoint_id: str, url: str) -> None:
    """Disables an endpoint whose receiver said it is gone, unless its url was changed meanwhile."""
    session.execute(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint_id, WebhookEndpoint.url == url, WebhookEndpoint.disabled_at.is_(None))
        .values(disabled_at=func.clock_timestamp(), disabled_reason="The receiver answered 410 Gone.")
        .execution_options(synchronize_session=False)
    )
