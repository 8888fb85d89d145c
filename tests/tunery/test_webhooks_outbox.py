"""Delivery from a job's end to a receiver: at least once, signed, never twice at a time, whatever fails between."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address

import openai
import pytest
import rows
from cloned_databases import Database
from receiver import LOOPBACK, Received, Receiver, answer
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session
from standardwebhooks.webhooks import Webhook

from tunery import db
from tunery.baselines import ledger as ledger_of_baselines
from tunery.baselines.order import Order
from tunery.datasets import reports
from tunery.jobs import ledger
from tunery.jobs.model import Job, JobEvent
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.settings import Settings
from tunery.webhooks import endpoints, outbox
from tunery.webhooks.messages import EVENT_TYPES
from tunery.webhooks.model import Delivery, DeliveryTry, WebhookEndpoint

ENDS = [State.SUCCEEDED, State.FAILED, State.CANCELLED]


@pytest.fixture
def allowing(database: Database) -> Settings:
    return database.settings.model_copy(update={"webhook_allow": LOOPBACK})


@pytest.fixture
def project(session: Session) -> Project:
    project = rows.project(session)
    session.commit()
    return project


@pytest.fixture
def endpoint(session: Session, project: Project, receiver: Receiver) -> WebhookEndpoint:
    return _endpoint(session, project, f"{receiver.url}/hook")


def _endpoint(session: Session, project: Project, url: str, *types: str) -> WebhookEndpoint:
    made = endpoints.create(session, project.id, name="ci", url=url, event_types=types or EVENT_TYPES, allow=LOOPBACK)
    session.commit()
    return made


def test_a_read_file_goes_to_its_project_alone(
    allowing: Settings, session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver
) -> None:
    _endpoint(session, rows.project(session), f"{receiver.url}/foreign")
    file = rows.file(session, project, sha256="a" * 64)
    report = reports.request(session, file)
    reports.finish(session, report, summary={"rows": 3, "findings": 2, "trainable": True, "reason": None})
    session.commit()
    assert outbox.deliver_due(allowing) == 1
    (received,) = receiver.received
    client = openai.OpenAI(api_key="x", webhook_secret=endpoint.secret)
    event = client.webhooks.unwrap(received.body, received.headers)
    expected = {"status": "ready", "rows": 3, "findings": 2, "trainable": True}
    assert (event.type, event.data.id, event.data.report) == ("file.processed", file.id, expected)
    assert outbox.deliver_due(allowing) == 0, "an event is sent once"


def test_an_ended_baseline_goes_to_its_project_once(
    allowing: Settings, session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver
) -> None:
    base, file = rows.base(session), rows.file(session, project)
    made = [ledger_of_baselines.request(session, project.id, base, file, None, Order()) for _ in range(2)]
    session.commit()
    assert outbox.deliver_due(allowing) == 0, "neither has ended"
    ledger_of_baselines.cancel(session, project.id, made[0].id)
    session.commit()
    assert outbox.deliver_due(allowing) == 1
    (received,) = receiver.received
    Webhook(endpoint.secret).verify(received.body, received.headers)
    event = json.loads(received.body)
    assert (event["type"], event["data"]) == ("fine_tuning.baseline.cancelled", {"id": made[0].id})
    assert outbox.deliver_due(allowing) == 0, "an event is sent once"


def _end(session: Session, project: Project, state: State = State.SUCCEEDED) -> Job:
    job = rows.job(session, project, state=state)
    session.commit()
    return job


def _only(session: Session) -> Delivery:
    session.expire_all()
    return session.scalars(select(Delivery)).one()


def _tries(session: Session) -> list[tuple[int, int | None, str | None]]:
    tries = session.scalars(select(DeliveryTry).order_by(DeliveryTry.delivery_id, DeliveryTry.number))
    return [(each.number, each.status_code, each.error) for each in tries]


def _hurry(session: Session) -> None:
    """Ends every wait, by the database's clock."""
    past = func.clock_timestamp() - timedelta(seconds=1)
    session.execute(update(Delivery).where(Delivery.state == "pending").values(next_try_at=past))
    session.execute(update(Delivery).where(Delivery.claimed_until.is_not(None)).values(claimed_until=past))
    session.commit()


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "waited 20 s in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("state", ENDS)
def test_a_jobs_end_arrives_and_verifies(
    session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver, allowing: Settings, state: State
) -> None:
    job = _end(session, project, state)
    assert outbox.deliver_due(allowing) == 1

    [received] = receiver.received
    event = Webhook(endpoint.secret).verify(received.body, received.headers)
    ended = session.scalars(select(JobEvent).where(JobEvent.outcome.is_not(None))).one()
    assert event == {
        "id": ended.id.replace("ftevent-", "evt_"),
        "object": "event",
        "type": f"fine_tuning.job.{state}",
        "created_at": int(ended.created_at.timestamp()),
        "timestamp": event["timestamp"],
        "data": {"id": job.id},
    }
    assert event["timestamp"].endswith("Z")
    parsed = openai.OpenAI(api_key="unused").webhooks.unwrap(received.body, received.headers, secret=endpoint.secret)
    assert (parsed.type, parsed.data.id) == (f"fine_tuning.job.{state}", job.id)  # type: ignore[union-attr]
    delivery = _only(session)
    assert (delivery.state, delivery.tries, delivery.id) == ("delivered", 1, received.headers["webhook-id"])
    assert _tries(session) == [(1, 200, None)]
    assert outbox.deliver_due(allowing) == 0


def test_a_gates_verdict_arrives_and_a_later_publish_changes_no_try(
    session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver, allowing: Settings
) -> None:
    job = rows.job(session, project, state=State.RUNNING)
    job.gate = {"status": "failed", "withheld": True, "checks": []}
    ended = rows.final_values(session, job, State.SUCCEEDED)
    ledger.move(session, job, State.SUCCEEDED, message="ended", **ended)
    session.commit()
    receiver.behaviours["/hook"] = answer(500)
    outbox.deliver_due(allowing)
    job.gate = {**job.gate, "published": {"reason": "r", "key": "k", "at": 1}}
    _hurry(session)
    outbox.deliver_due(allowing)

    first, second = receiver.received
    assert json.loads(first.body)["data"] == {"id": job.id, "gate": {"status": "failed", "withheld": True}}
    assert first.body == second.body
    _unwrap(first, endpoint.secret)


def test_the_verdict_on_the_served_model_arrives(
    session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver, allowing: Settings
) -> None:
    job = rows.job(session, project, state=State.RUNNING)
    job.served = {"status": "differs", "withheld": True, "rows": 2, "equal": 1, "first_difference": {"row": 1}}
    ledger.move(session, job, State.SUCCEEDED, message="ended", **rows.final_values(session, job, State.SUCCEEDED))
    session.commit()
    outbox.deliver_due(allowing)

    [received] = receiver.received
    assert json.loads(received.body)["data"] == {"id": job.id, "served": {"status": "differs", "withheld": True}}


@pytest.mark.parametrize("of_today", [True, False])
def test_the_primary_metric_of_a_scorecard_arrives(
    session: Session,
    project: Project,
    endpoint: WebhookEndpoint,
    receiver: Receiver,
    allowing: Settings,
    of_today: bool,
) -> None:
    found = {"base": 0.1, "tuned": 0.8, "gain": 0.7, "low": 0.6, "high": 0.75, "p": None}
    other = {**found, "tuned": 0.9}
    job = rows.job(session, project, state=State.RUNNING)
    job.scorecard = {"rows": 9, "base_exact": 0.1, "samples": [{"prompt": "a secret"}]}
    if of_today:
        job.scorecard |= {"primary": "chrf", "metrics": {"exact": other, "chrf": found}}
    ledger.move(session, job, State.SUCCEEDED, message="ended", **rows.final_values(session, job, State.SUCCEEDED))
    session.commit()
    outbox.deliver_due(allowing)

    [received] = receiver.received
    scored = {"scorecard": {"rows": 9, "metric": "chrf", **found}} if of_today else {}
    assert json.loads(received.body)["data"] == {"id": job.id} | scored


def test_each_endpoint_hears_what_it_asked_for(
    session: Session, project: Project, receiver: Receiver, allowing: Settings
) -> None:
    other = rows.project(session)
    _endpoint(session, project, f"{receiver.url}/all")
    _endpoint(session, project, f"{receiver.url}/failures", "fine_tuning.job.failed")
    _endpoint(session, other, f"{receiver.url}/other")
    gone = _endpoint(session, project, f"{receiver.url}/gone")
    endpoints.delete(session, project.id, gone.id)
    session.commit()
    for state in ENDS:
        _end(session, project, state)
    _endpoint(session, project, f"{receiver.url}/late")
    outbox.deliver_due(allowing)

    assert [len(receiver.on(path)) for path in ("/all", "/failures", "/other", "/gone", "/late")] == [3, 1, 0, 0, 0]


def test_jobs_that_go_on_are_no_event(session: Session, project: Project, endpoint: WebhookEndpoint) -> None:
    for state in set(State) - set(ENDS):
        rows.job(session, project, state=state)
    assert outbox.fan_out(session) == 0


def test_many_fan_outs_make_each_delivery_once(
    session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver
) -> None:
    _endpoint(session, project, f"{receiver.url}/two")
    for _ in range(5):
        _end(session, project)

    def fan_out(_: int) -> int:
        with db.transaction() as mine:
            return outbox.fan_out(mine)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(fan_out, range(8))) == 10
    session.execute(update(JobEvent).values(fanned_out=False))
    session.commit()
    assert fan_out(0) == 0, "even a lost mark makes no second delivery"
    assert session.scalar(select(func.count()).select_from(Delivery)) == 10


def test_many_senders_send_each_delivery_once(
    session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver, allowing: Settings
) -> None:
    for _ in range(12):
        _end(session, project, State.CANCELLED)
    with ThreadPoolExecutor(3) as pool:
        assert sum(pool.map(lambda _: outbox.deliver_due(allowing), range(3))) == 12

    ids = [each.headers["webhook-id"] for each in receiver.received]
    assert len(ids) == len(set(ids)) == 12
    assert session.scalar(select(func.count()).where(Delivery.state == "delivered")) == 12


def test_a_claim_in_the_making_is_nobody_elses(
    session: Session, project: Project, endpoint: WebhookEndpoint, database: Database
) -> None:
    _end(session, project)
    outbox.fan_out(session)
    session.commit()
    with database.sessions() as one, database.sessions() as other:
        other.execute(text("SET LOCAL lock_timeout = '5s'"))  # waiting for the first would be as wrong as sharing
        assert len(outbox._claim(one, 8)) == 1
        assert outbox._claim(other, 8) == []


def test_failures_follow_the_schedule_and_end(
    session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver, allowing: Settings
) -> None:
    receiver.behaviours["/hook"] = answer(500)
    _end(session, project)
    for delay in outbox.DELAYS[1:]:
        assert outbox.deliver_due(allowing) == 1
        wait = _only(session).next_try_at
        assert wait is not None
        # 30 s of slack: the row is written after the response, and the clock is read later still.
        assert delay - 30 < (wait - db.now(session)).total_seconds() <= delay * 1.2
        assert outbox.deliver_due(allowing) == 0
        _hurry(session)
    assert outbox.deliver_due(allowing) == 1

    assert _only(session).state == "failed"
    assert [number for number, status, _ in _tries(session) if status == 500] == list(range(1, 11))
    assert len({each.headers["webhook-id"] for each in receiver.received}) == 1
    assert len({each.body for each in receiver.received}) == 1
    assert outbox.deliver_due(allowing) == 0


def test_delays_have_jitter_and_respect_retry_after() -> None:
    waits = {outbox.delay_after(2) for _ in range(20)}
    assert len(waits) > 1
    assert all(300 <= wait <= 360 for wait in waits)
    assert outbox.delay_after(1, 600) == 600
    assert outbox.delay_after(9, 1) >= 86_400


def test_retry_after_is_honoured(
    session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver, allowing: Settings
) -> None:
    receiver.behaviours["/hook"] = answer(429, retry_after="3600")
    _end(session, project)
    outbox.deliver_due(allowing)
    wait = _only(session).next_try_at
    assert wait is not None
    assert (wait - db.now(session)).total_seconds() > 3500


def test_410_disables_the_endpoint_and_all_that_is_owed_to_it(
    session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver, allowing: Settings
) -> None:
    receiver.behaviours["/hook"] = answer(500)
    for _ in range(2):
        _end(session, project)
    outbox.deliver_due(allowing)
    receiver.behaviours["/hook"] = answer(410)
    first = session.scalars(select(Delivery.id).order_by(Delivery.created_at)).first()
    session.execute(update(Delivery).where(Delivery.id == first).values(next_try_at=func.now() - timedelta(seconds=1)))
    session.commit()
    outbox.deliver_due(allowing)

    session.refresh(endpoint)
    assert endpoint.disabled_reason == "The receiver answered 410 Gone."
    assert set(session.scalars(select(Delivery.state))) == {"failed"}
    _end(session, project)
    assert outbox.deliver_due(allowing) == 0
    endpoints.update(session, project.id, endpoint.id, url=endpoint.url, allow=LOOPBACK)
    receiver.behaviours.clear()
    _end(session, project)
    assert outbox.deliver_due(allowing) == 1, "what ended while it was disabled is not sent; what ends after is"


def test_a_sender_that_dies_after_its_post_sends_again_under_the_same_id(
    session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver, allowing: Settings
) -> None:
    _end(session, project)
    calls = 0

    @contextmanager
    def dying() -> Iterator[Session]:
        nonlocal calls
        calls += 1
        if receiver.received:
            raise KeyboardInterrupt
        with db.transaction() as mine:
            yield mine

    with pytest.raises(KeyboardInterrupt):
        outbox.deliver_due(allowing, transaction=dying)
    assert outbox.deliver_due(allowing) == 0, "claimed: it could still be on its way"
    _hurry(session)
    assert outbox.deliver_due(allowing) == 1

    first, second = receiver.received
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body
    assert _tries(session) == [(1, None, None), (2, 200, None)]
    assert _only(session).state == "delivered"


def test_a_sender_that_comes_back_late_changes_nothing(
    session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver, allowing: Settings
) -> None:
    def overtaken(handler: BaseHTTPRequestHandler) -> None:
        if len(receiver.received) == 1:  # the first sender hangs here until a second one has delivered
            receiver.released.wait()
            answer(500)(handler)
        else:
            answer(200)(handler)

    receiver.behaviours["/hook"] = overtaken
    _end(session, project)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(outbox.deliver_due, allowing)
        _until(lambda: len(receiver.received) == 1)
        _hurry(session)
        outbox.deliver_due(allowing)
        _until(lambda: len(receiver.received) == 2)
        _until(lambda: _only(session).state == "delivered")
        receiver.released.set()
        late.result()

    assert _only(session).state == "delivered"
    assert [status for _, status, _ in _tries(session)] == [500, 200]


def test_a_hanging_receiver_does_not_hold_up_the_others(
    session: Session, project: Project, receiver: Receiver, allowing: Settings
) -> None:
    _endpoint(session, project, f"{receiver.url}/hang")
    _endpoint(session, project, f"{receiver.url}/good")

    def hang(handler: BaseHTTPRequestHandler) -> None:
        receiver.released.wait()

    receiver.behaviours["/hang"] = hang
    for _ in range(outbox.SENDERS + 2):
        _end(session, project, State.CANCELLED)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(outbox.deliver_due, allowing)
        _until(lambda: len(receiver.on("/good")) == outbox.SENDERS + 2)
        assert len(receiver.on("/hang")) == outbox.PER_ENDPOINT
        _end(session, project, State.CANCELLED)  # nor is the event of a job that ends meanwhile delayed
        _until(lambda: len(receiver.on("/good")) == outbox.SENDERS + 3)
        assert not sending.done()
        receiver.released.set()
        sending.result()


def test_no_transaction_is_open_during_a_post(
    session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver, allowing: Settings
) -> None:
    open_during_post: list[int] = []
    idle_in_transaction = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state ~ '^idle in transaction'"
    )

    def look(handler: BaseHTTPRequestHandler) -> None:
        with db.transaction() as mine:
            open_during_post.append(mine.scalar(idle_in_transaction) or 0)
        answer(200)(handler)

    receiver.behaviours["/hook"] = look
    _end(session, project)
    session.rollback()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(outbox.deliver_due, allowing).result()
    assert open_during_post == [0]


def test_during_a_rotation_both_secrets_verify(
    session: Session, project: Project, endpoint: WebhookEndpoint, receiver: Receiver, allowing: Settings
) -> None:
    old = endpoint.secret
    endpoints.rotate_secret(session, project.id, endpoint.id, keep_old=True)
    session.commit()
    _end(session, project)
    outbox.deliver_due(allowing)

    [received] = receiver.received
    for secret in (old, endpoint.secret):
        Webhook(secret).verify(received.body, received.headers)
        _unwrap(received, secret)


def _unwrap(received: Received, secret: str) -> None:
    openai.OpenAI(api_key="unused").webhooks.unwrap(received.body, received.headers, secret=secret)


def test_a_name_that_turned_private_is_refused_at_delivery(
    session: Session, project: Project, receiver: Receiver, database: Database
) -> None:
    public = [ip_address("93.184.216.34")]
    endpoints.create(
        session,
        project.id,
        name="rebinding",
        url="https://rebind.example:8443/hook",
        event_types=EVENT_TYPES,
        allow=(),
        resolver=lambda *_: public,
    )
    session.commit()
    _end(session, project)
    assert outbox.deliver_due(database.settings, resolver=lambda *_: [ip_address("127.0.0.1")]) == 1

    [(number, status, error)] = _tries(session)
    assert (number, status) == (1, None)
    assert "not public" in str(error)
    assert receiver.received == []
    assert _only(session).state == "pending", "names may come right again"
