"""What a project can do with its webhook endpoints; those of other projects do not exist for it."""

from collections.abc import Callable
from datetime import timedelta

import pytest
import rows
from receiver import LOOPBACK, Receiver, answer
from sqlalchemy import update
from sqlalchemy.orm import Session
from standardwebhooks.webhooks import Webhook

from tunery import db
from tunery.errors import InvalidValue, NotFound
from tunery.keys.model import Project
from tunery.settings import Settings
from tunery.webhooks import endpoints
from tunery.webhooks.errors import AddressRefused, ReceiverSilent
from tunery.webhooks.messages import EVENT_TYPES
from tunery.webhooks.model import WebhookEndpoint

URL = "https://1.1.1.1/hook"


@pytest.fixture
def project(session: Session) -> Project:
    return rows.project(session)


def _create(session: Session, project: Project, name: str = "ci", url: str = URL) -> WebhookEndpoint:
    return endpoints.create(session, project.id, name=name, url=url, event_types=EVENT_TYPES, allow=LOOPBACK)


def _update(session: Session, endpoint: WebhookEndpoint, **values: object) -> WebhookEndpoint:
    return endpoints.update(session, endpoint.project_id, endpoint.id, allow=LOOPBACK, **values)  # type: ignore[arg-type]


def test_a_new_endpoint(session: Session, project: Project) -> None:
    endpoint = _create(session, project)
    session.expire(endpoint)

    assert endpoint.id.startswith("we_")
    assert endpoint.secret.startswith("whsec_")
    assert endpoint.event_types == list(EVENT_TYPES)
    assert endpoint.updated_at == endpoint.created_at
    assert endpoints.retrieve(session, project.id, endpoint.id) is endpoint


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("name", "", "1 to 128"),
        ("name", "x" * 129, "1 to 128"),
        ("name", "a\nb", "1 to 128"),
        ("event_types", [], "at least one of fine_tuning"),
        ("event_types", ["fine_tuning.job.canceled"], "'fine_tuning.job.canceled' is not an event type"),
        ("url", "hooks", "A webhook's url"),
    ],
)
def test_bad_values_are_named(session: Session, project: Project, field: str, value: object, words: str) -> None:
    good = {"name": "ci", "url": URL, "event_types": list(EVENT_TYPES)}
    with pytest.raises(InvalidValue, match=words) as caught:
        endpoints.create(session, project.id, allow=(), **good | {field: value})  # type: ignore[arg-type]
    assert caught.value.param == field
    with pytest.raises(InvalidValue, match=words):
        _update(session, _create(session, project), **{field: value})


def test_private_addresses_are_refused(session: Session, project: Project) -> None:
    with pytest.raises(AddressRefused, match="TUNERY_WEBHOOK_ALLOW"):
        _create(session, project, url="https://169.254.169.254/latest/meta-data")
    with pytest.raises(AddressRefused):
        _update(session, _create(session, project), url="https://10.0.0.1/")


def test_pages_newest_first(session: Session, project: Project) -> None:
    made = [_create(session, project, f"{number}").id for number in range(5)]
    _create(session, rows.project(session))
    newest_first = made[::-1]

    page, more = endpoints.list_page(session, project.id, limit=2)
    assert ([each.id for each in page], more) == (newest_first[:2], True)
    endpoints.delete(session, project.id, page[-1].id)
    page, more = endpoints.list_page(session, project.id, after=page[-1].id, limit=3)
    assert ([each.id for each in page], more) == (newest_first[2:], False)
    with pytest.raises(NotFound) as refused:
        endpoints.list_page(session, rows.project(session).id, after=made[0])
    assert refused.value.param == "after"


def test_an_update_moves_its_time_only_when_something_changed(session: Session, project: Project) -> None:
    endpoint = _create(session, project)
    before = endpoint.updated_at
    assert _update(session, endpoint, name="ci", url=URL, event_types=EVENT_TYPES).updated_at == before
    assert _update(session, endpoint).updated_at == before
    changed = _update(session, endpoint, name="cd", event_types=[EVENT_TYPES[0], EVENT_TYPES[0]])
    assert (changed.name, changed.event_types) == ("cd", [EVENT_TYPES[0]])
    assert changed.updated_at > before


def test_naming_its_url_enables_an_endpoint_again(session: Session, project: Project) -> None:
    endpoint = _create(session, project)
    endpoint.disabled_at, endpoint.disabled_reason = db.now(session), "The receiver answered 410 Gone."
    session.flush()
    _update(session, endpoint, name="other")
    assert endpoint.disabled_at is not None
    _update(session, endpoint, url=URL)
    assert endpoint.disabled_at is None
    assert endpoint.disabled_reason is None


def test_rotation(session: Session, project: Project) -> None:
    endpoint = _create(session, project)
    first, before = endpoint.secret, endpoint.updated_at
    endpoints.rotate_secret(session, project.id, endpoint.id, keep_old=True)
    second = endpoint.secret
    now = db.now(session)

    assert second != first
    assert endpoint.updated_at > before
    assert endpoints.secrets_of(endpoint, now) == (second, first)
    assert endpoints.secrets_of(endpoint, now + timedelta(hours=23, minutes=59)) == (second, first)
    assert endpoints.secrets_of(endpoint, now + timedelta(hours=24, minutes=1)) == (second,)

    endpoints.rotate_secret(session, project.id, endpoint.id)
    assert endpoints.secrets_of(endpoint, db.now(session)) == (endpoint.secret,)
    assert endpoint.secret not in (first, second)


ACTIONS: list[Callable[[Session, str, str], object]] = [
    endpoints.retrieve,
    lambda session, project, endpoint: endpoints.update(session, project, endpoint, name="mine", allow=()),
    endpoints.rotate_secret,
    lambda session, project, endpoint: endpoints.sample(session, project, endpoint, EVENT_TYPES[0]),
    endpoints.delete,
]


@pytest.mark.parametrize("action", ACTIONS)
def test_anothers_endpoint_and_a_deleted_one_do_not_exist(
    session: Session, project: Project, action: Callable[[Session, str, str], object]
) -> None:
    endpoint = _create(session, project)
    secret, other = endpoint.secret, rows.project(session)
    with pytest.raises(NotFound, match="No webhook endpoint"):
        action(session, other.id, endpoint.id)
    session.refresh(endpoint)
    assert (endpoint.name, endpoint.secret, endpoint.deleted_at) == ("ci", secret, None)

    action(session, project.id, endpoint.id)
    if endpoint.deleted_at is None:
        endpoints.delete(session, project.id, endpoint.id)
    with pytest.raises(NotFound):
        action(session, project.id, endpoint.id)


def test_a_project_has_a_limited_number(session: Session, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "MOST", 2)
    first = _create(session, project)
    _create(session, project)
    with pytest.raises(InvalidValue, match="Delete one first"):
        _create(session, project)
    endpoints.delete(session, project.id, first.id)
    _create(session, project)
    _create(session, rows.project(session))


def test_a_test_message_tells_the_receivers_status(session: Session, project: Project, receiver: Receiver) -> None:
    endpoint = _create(session, project, url=f"{receiver.url}/hook")
    settings = Settings(webhook_allow=LOOPBACK)
    message = endpoints.sample(session, project.id, endpoint.id, "fine_tuning.job.failed")
    assert endpoints.deliver_sample(message, settings) == 200
    receiver.behaviours["/hook"] = answer(503)
    assert endpoints.deliver_sample(message, settings) == 503

    [received, _] = receiver.received
    event = Webhook(endpoint.secret).verify(received.body, received.headers)
    assert event["type"] == "fine_tuning.job.failed"
    assert event["data"]["id"].startswith("ftjob-")
    session.execute(update(WebhookEndpoint).values(url="http://127.0.0.1:1/"))
    session.expire_all()
    dead = endpoints.sample(session, project.id, endpoint.id, "fine_tuning.job.failed")
    with pytest.raises(ReceiverSilent, match="Connection refused"):
        endpoints.deliver_sample(dead, settings)
    with pytest.raises(InvalidValue, match="is not an event type"):
        endpoints.sample(session, project.id, endpoint.id, "batch.completed")
