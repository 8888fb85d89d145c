"""A project's webhook endpoints. The caller commits. Endpoints of other projects raise NotFound."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from tunery import db, ids
from tunery.errors import InvalidValue, NotFound
from tunery.paging import page
from tunery.settings import Settings
from tunery.webhooks import messages, signing
from tunery.webhooks.addresses import Network, Resolver, check, resolve
from tunery.webhooks.errors import ReceiverSilent
from tunery.webhooks.messages import BASELINE_TYPES, EVENT_TYPES, FILE_TYPES, JOB_TYPES, Message
from tunery.webhooks.model import WebhookEndpoint

OVERLAP = timedelta(hours=24)
"""How long a rotated secret still signs, if requested."""
MOST = 50
"""Maximum endpoints of a project: every event is sent to each of them."""


def create(
    session: Session,
    project_id: str,
    *,
    name: str,
    url: str,
    event_types: Sequence[str],
    allow: Sequence[Network],
    resolver: Resolver = resolve,
) -> WebhookEndpoint:
    """Creates an endpoint, whose `secret` is to be shown once. Raises InvalidValue, AddressRefused."""
    held = session.scalar(select(func.count()).where(_live(project_id)))
    if (held or 0) >= MOST:
        raise InvalidValue(reason=f"This project has {held} webhook endpoints, its limit. Delete one first.")
    check(url, allow, resolver)
    endpoint = WebhookEndpoint(
        id=ids.new(ids.WEBHOOK_ENDPOINT),
        project_id=project_id,
        name=_checked_name(name),
        url=url,
        event_types=_checked_types(event_types),
        secret=signing.new_secret(),
    )
    session.add(endpoint)
    session.flush()
    endpoint.updated_at = endpoint.created_at
    session.flush()
    return endpoint


def retrieve(session: Session, project_id: str, endpoint_id: str) -> WebhookEndpoint:
    """Returns an endpoint. Raises NotFound."""
    endpoint = session.scalar(select(WebhookEndpoint).where(_live(project_id), WebhookEndpoint.id == endpoint_id))
    if endpoint is None:
        raise NotFound(kind="webhook endpoint", id=endpoint_id)
    return endpoint


def list_page(
    session: Session, project_id: str, *, after: str | None = None, limit: int = 20
) -> tuple[list[WebhookEndpoint], bool]:
    """Returns one page, newest first, and whether more follow. Raises NotFound for an unknown `after`."""
    owned = select(WebhookEndpoint).where(WebhookEndpoint.project_id == project_id)
    by = (WebhookEndpoint.created_at, WebhookEndpoint.id)
    id, live = WebhookEndpoint.id, _live(project_id)
    return page(session, owned, live, by=by, id=id, kind="webhook endpoint", after=after, limit=limit)


def update(
    session: Session,
    project_id: str,
    endpoint_id: str,
    *,
    name: str | None = None,
    url: str | None = None,
    event_types: Sequence[str] | None = None,
    allow: Sequence[Network],
    resolver: Resolver = resolve,
) -> WebhookEndpoint:
    """Changes the given fields; `updated_at` only if something changed. Giving a url re-enables a disabled endpoint.

    Raises NotFound, InvalidValue, AddressRefused.
    """
    endpoint = retrieve(session, project_id, endpoint_id)
    wanted: dict[str, object] = {}
    if name is not None:
        wanted["name"] = _checked_name(name)
    if event_types is not None:
        wanted["event_types"] = _checked_types(event_types)
    if url is not None:
        check(url, allow, resolver)
        wanted |= {"url": url, "disabled_at": None, "disabled_reason": None}
    changed = {field: value for field, value in wanted.items() if getattr(endpoint, field) != value}
    if changed:
        for field, value in {**changed, "updated_at": db.now(session)}.items():
            setattr(endpoint, field, value)
        session.flush()
    return endpoint


def delete(session: Session, project_id: str, endpoint_id: str) -> None:
    """Deletes an endpoint; its pending deliveries are dropped. Raises NotFound."""
    endpoint = retrieve(session, project_id, endpoint_id)
    endpoint.deleted_at = db.now(session)
    session.flush()


def rotate_secret(session: Session, project_id: str, endpoint_id: str, *, keep_old: bool = False) -> WebhookEndpoint:
    """Sets a new `secret`, to be shown once; with `keep_old` the old one also signs for OVERLAP. Raises NotFound."""
    endpoint = retrieve(session, project_id, endpoint_id)
    now = db.now(session)
    endpoint.previous_secret = endpoint.secret if keep_old else None
    endpoint.previous_valid_until = now + OVERLAP if keep_old else None
    endpoint.secret, endpoint.updated_at = signing.new_secret(), now
    session.flush()
    return endpoint


def sample(session: Session, project_id: str, endpoint_id: str, event_type: str) -> Message:
    """Returns a sample event for an endpoint, to be sent by `deliver_sample`. Raises NotFound, InvalidValue.

    Two steps, so that no transaction stays open during a slow request.
    """
    endpoint = retrieve(session, project_id, endpoint_id)
    if event_type not in EVENT_TYPES:
        raise _unknown_type(event_type, "event_type")
    kinds = {FILE_TYPES: ids.FILE, JOB_TYPES: ids.JOB, BASELINE_TYPES: ids.BASELINE}
    about = next(prefix for types, prefix in kinds.items() if event_type in types) + "test"
    body = messages.encode(ids.new(ids.WEBHOOK_EVENT), event_type, datetime.now(UTC), about)
    return Message(ids.new(ids.WEBHOOK_DELIVERY), endpoint.url, secrets_of(endpoint, db.now(session)), body)


def deliver_sample(message: Message, settings: Settings, *, resolver: Resolver = resolve) -> int:
    """Sends a test once, without retries; returns the receiver's status code. Raises ReceiverSilent."""
    answer = messages.send(message, settings.webhook_allow, resolver=resolver)
    if answer.status_code is None:
        raise ReceiverSilent(reason=answer.error)
    return answer.status_code


def secrets_of(endpoint: WebhookEndpoint, now: datetime) -> tuple[str, ...]:
    """Returns the secrets that sign at `now`, the current one first."""
    if endpoint.previous_secret and endpoint.previous_valid_until and now < endpoint.previous_valid_until:
        return endpoint.secret, endpoint.previous_secret
    return (endpoint.secret,)


def _live(project_id: str) -> ColumnElement[bool]:
    return (WebhookEndpoint.project_id == project_id) & WebhookEndpoint.deleted_at.is_(None)


def _checked_name(name: str) -> str:
    if not 0 < len(name.strip()) <= 128 or not name.isprintable():
        raise InvalidValue(param="name", reason="A webhook endpoint's name must have 1 to 128 printable characters.")
    return name


def _checked_types(event_types: Sequence[str]) -> list[str]:
    if not event_types:
        raise InvalidValue(param="event_types", reason=f"Name at least one of {', '.join(EVENT_TYPES)}.")
    for event_type in event_types:
        if event_type not in EVENT_TYPES:
            raise _unknown_type(event_type, "event_types")
    return list(dict.fromkeys(event_types))


def _unknown_type(event_type: str, param: str) -> InvalidValue:
    return InvalidValue(param=param, reason=f"'{event_type}' is not an event type. Use {', '.join(EVENT_TYPES)}.")
