"""Prometheus metrics: the state of the service, and how far runs were from their quotes."""

import re
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import pytest
import rows
from cloned_databases import Database
from fastapi.testclient import TestClient
from sqlalchemy import func, update
from sqlalchemy.orm import Session
from teams import Team

from tunery.jobs import leases
from tunery.jobs.model import HostDevice, Job
from tunery.jobs.states import State
from tunery.keys import auth
from tunery.traffic.model import ModelUsage
from tunery.webhooks import outbox
from tunery.webhooks.model import Delivery


def _ended(session: Session, of_quoted: float | None, *, in_range: bool | None, speed_from: str = "same") -> None:
    job = rows.job(session, state=State.SUCCEEDED)
    job.quote = {"speed_from": speed_from}
    job.actual = {"of_quoted": of_quoted, "in_range": in_range}


def test_the_distribution_of_quotes_errors_is_a_histogram(team: Team, database: Database) -> None:
    with database.sessions.begin() as session:
        for of_quoted in (0.95, 1.05, 1.2, 3.0):
            _ended(session, of_quoted, in_range=of_quoted < 2)
        _ended(session, 9.5, in_range=False, speed_from="estimated")
        _ended(session, None, in_range=None)
        rows.job(session, state=State.SUCCEEDED)  # of an older release, without a quote
        _, secret = auth.create_key(session, rows.project(session), "operator", admin=True)
    assert team.http.get("/metrics").status_code == 403
    client: TestClient = team.http
    answer = client.get("/metrics", headers={"authorization": f"Bearer {secret}"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    lines = answer.text.splitlines()
    name = "tunery_job_actual_to_quoted_ratio"
    for bucket, count in {"0.9": 0, "1": 1, "1.1": 2, "1.2": 3, "2": 3, "4": 4, "+Inf": 4}.items():
        assert f'{name}_bucket{{speed_from="same",le="{bucket}"}} {count}' in lines
    assert f'{name}_sum{{speed_from="same"}} 6.2' in lines
    assert f'{name}_count{{speed_from="same"}} 4' in lines
    assert f'{name}_bucket{{speed_from="estimated",le="4"}} 0' in lines
    assert 'tunery_jobs_in_quoted_range_total{speed_from="same"} 3' in lines
    assert 'tunery_jobs_in_quoted_range_total{speed_from="estimated"} 0' in lines
    assert sum("quoted" in line for line in lines) == 4 + 2 * 13 + 2


@pytest.fixture
def scrape(team: Team, database: Database) -> Callable[[], dict[str, float]]:
    """Reads the samples as an operator's Prometheus does."""
    with database.sessions.begin() as session:
        _, secret = auth.create_key(session, rows.project(session), "operator", admin=True)

    def read() -> dict[str, float]:
        text = team.http.get("/metrics", headers={"authorization": f"Bearer {secret}"}).text
        assert text.endswith("\n")
        return _samples(text.splitlines())

    return read


def _samples(lines: list[str]) -> dict[str, float]:
    """Returns the samples by name and labels. Each follows the HELP and TYPE of its family, and is there once."""
    found: dict[str, float] = {}
    family, kind = "", ""
    for line in lines:
        if line.startswith("# HELP "):
            family = line.split()[2]
        elif line.startswith("# TYPE "):
            assert line.split()[2] == family
            kind = line.split()[3]
            # https://prometheus.io/docs/practices/naming/
            assert family.endswith("_total") == (kind == "counter"), line
            assert kind != "histogram" or family.endswith(("_seconds", "_ratio")), line
        else:
            sample, _, value = line.rpartition(" ")
            suffix = sample.partition("{")[0].removeprefix(family)
            assert suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",)), line
            assert sample not in found
            found[sample] = float(value)
    return found


def test_every_sample_an_alert_needs_is_there_before_anything_happens(scrape: Callable[[], dict[str, float]]) -> None:
    found = scrape()
    assert set(found.values()) == {0}
    for sample in (
        'tunery_jobs{state="queued"}',
        'tunery_oldest_waiting_job_seconds{state="validating_files"}',
        'tunery_jobs_ended_total{state="failed",code="worker_lost"}',
        'tunery_jobs_ended_total{state="succeeded",code=""}',
        'tunery_attempts_ended_total{outcome="lost"}',
        'tunery_job_duration_seconds_count{state="failed"}',
        'tunery_webhook_deliveries{state="failed"}',
        'tunery_webhook_deliveries{state="dropped"}',
        'tunery_webhook_endpoints{status="disabled"}',
        "tunery_model_requests_total",
        'tunery_model_tokens_total{kind="completion"}',
    ):
        assert sample in found


def _selectors(rules: str) -> list[tuple[str, dict[str, set[str]]]]:
    """Returns the metrics that alert rules name, each with its matchers: the values, or the alternatives of a regex."""
    found = re.findall(r"(tunery_\w+)\{([^}]*)\}", rules)
    assert len(found) == rules.count("tunery_"), "a rule names a metric without labels: check that one too"
    return [
        (metric, {label: set(value.split("|")) for label, value in re.findall(r'(\w+)=~?"([^"]*)"', matchers)})
        for metric, matchers in found
    ]


def test_the_guide_s_alerts_name_samples_that_exist(scrape: Callable[[], dict[str, float]], database: Database) -> None:
    """Of devices there are samples only where there are devices, one for each status here."""
    with database.sessions.begin() as session:
        for index, host in ((0, "host"), (1, "host"), (0, "silent")):
            device = {"device": "H200", "memory_bytes": 2**37, "bf16": True}
            leases.show_device(session, HostDevice(id=f"{host}/{index}", host=host, gpu_index=index, **device))
        old = func.clock_timestamp() - timedelta(minutes=6)
        session.execute(update(HostDevice).where(HostDevice.host == "silent").values(seen_at=old))
        rows.job(session, state=State.QUEUED)
        rows.claim(session, gpus=(1,))
    samples = list(scrape())
    guide = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    rules = re.findall(r"^ +- \{alert: .*$", guide, re.MULTILINE)
    assert len(rules) >= 8
    for metric, matchers in _selectors("\n".join(rules)):
        for label, values in matchers.items():
            for value in values:
                sample = re.compile(rf'{metric}\{{.*{label}="{value}"')
                assert any(map(sample.match, samples)), f"{metric} has no {label} {value}"


def test_jobs_are_counted_with_their_waits_and_times(
    scrape: Callable[[], dict[str, float]], database: Database
) -> None:
    with database.sessions.begin() as session:
        for state in (State.VALIDATING, State.QUEUED, State.QUEUED, State.PAUSED, State.SUCCEEDED, State.FAILED):
            rows.job(session, state=state)
        hour_ago = func.clock_timestamp() - timedelta(hours=1)
        session.execute(update(Job).where(Job.state == "validating_files").values(created_at=hour_ago))
        session.execute(update(Job).where(Job.state == "succeeded").values(created_at=hour_ago))
    found = scrape()
    live = {state: found[f'tunery_jobs{{state="{state}"}}'] for state in ("validating_files", "queued", "paused")}
    assert live == {"validating_files": 1, "queued": 2, "paused": 1}
    assert 3600 <= found['tunery_oldest_waiting_job_seconds{state="validating_files"}'] < 3660
    assert 0 < found['tunery_oldest_waiting_job_seconds{state="queued"}'] < 60
    assert found['tunery_jobs_ended_total{state="failed",code="job_failed"}'] == 1
    assert found['tunery_jobs_ended_total{state="succeeded",code=""}'] == 1
    name = "tunery_job_duration_seconds"
    assert found[f'{name}_bucket{{state="succeeded",le="900"}}'] == 0
    assert found[f'{name}_bucket{{state="succeeded",le="14400"}}'] == 1
    assert found[f'{name}_bucket{{state="failed",le="10"}}'] == 1
    assert 3590 < found[f'{name}_sum{{state="succeeded"}}'] < 3660
    assert found["tunery_job_wait_seconds_count"] == 0


def test_devices_are_busy_while_an_attempt_holds_them(
    scrape: Callable[[], dict[str, float]], database: Database
) -> None:
    with database.sessions.begin() as session:
        for index, host in ((0, "host"), (1, "host"), (0, "other"), (None, 'odd"host')):
            device = {"device": "H200", "memory_bytes": 2**37, "bf16": True}
            leases.show_device(session, HostDevice(id=f"{host}/{index}", host=host, gpu_index=index, **device))
        old = func.clock_timestamp() - timedelta(minutes=6)
        session.execute(update(HostDevice).where(HostDevice.host == "other").values(seen_at=old))
        rows.job(session, state=State.QUEUED)
        lease = rows.claim(session, gpus=(1,))
    found = scrape()
    devices = {sample: value for sample, value in found.items() if sample.startswith("tunery_devices")}
    assert devices == {
        'tunery_devices{host="host",gpu="0",device="H200",status="free"}': 1,
        'tunery_devices{host="host",gpu="1",device="H200",status="busy"}': 1,
        'tunery_devices{host="odd\\"host",gpu="",device="H200",status="free"}': 1,
        'tunery_devices{host="other",gpu="0",device="H200",status="silent"}': 1,
    }
    assert found["tunery_job_wait_seconds_count"] == 1
    with database.sessions.begin() as session:
        leases.end_attempt(session, lease, "lost")
    found = scrape()
    assert found['tunery_devices{host="host",gpu="1",device="H200",status="free"}'] == 1
    assert found['tunery_attempts_ended_total{outcome="lost"}'] == 1


def test_devices_of_a_stopped_worker_are_not_silent(scrape: Callable[[], dict[str, float]], database: Database) -> None:
    """An alert on silence would wake somebody at each upgrade."""

    def statuses() -> dict[str, str]:
        samples = [sample for sample in scrape() if sample.startswith("tunery_devices{")]
        return {sample.split('"')[3]: sample.split('"')[7] for sample in samples}

    def show(index: int) -> None:
        device = HostDevice(
            id=f"host/{index}", host="host", gpu_index=index, device="H200", memory_bytes=2**37, bf16=True
        )
        with database.sessions.begin() as session:
            leases.show_device(session, device)

    for index in range(3):
        show(index)
    with database.sessions.begin() as session:
        rows.job(session, state=State.QUEUED)
        rows.claim(session, gpus=(2,))
        leases.withdraw_devices(session, ["host/0", "host/2"])
    assert statuses() == {"0": "stopped", "1": "free", "2": "busy"}, "the stopped worker still saves a run"
    with database.sessions.begin() as session:
        old = timedelta(minutes=6)
        times = {"seen_at": HostDevice.seen_at - old, "stopped_at": HostDevice.stopped_at - old}
        session.execute(update(HostDevice).values(times))
    assert statuses() == {"0": "stopped", "1": "silent", "2": "busy"}
    show(0)
    assert statuses()["0"] == "free", "another worker offers it, or the same one again"


@pytest.mark.parametrize(("tries", "state"), [(2, "dropped"), (10, "failed")])
def test_deliveries_that_nobody_wants_are_no_failures(
    scrape: Callable[[], dict[str, float]], database: Database, tries: int, state: str
) -> None:
    """An alert on failures would wake somebody for each endpoint that a user deletes."""
    with database.sessions.begin() as session:
        owner = rows.project(session)
        rows.endpoint(session, owner)
        rows.job(session, owner, State.SUCCEEDED)
        outbox.fan_out(session)
        session.execute(
            update(Delivery).values(state="failed", tries=tries, next_try_at=None, finished_at=func.clock_timestamp())
        )
    found = scrape()
    counts = {name: found[f'tunery_webhook_deliveries{{state="{name}"}}'] for name in ("pending", "failed", "dropped")}
    assert counts == {"pending": 0, "failed": 0, "dropped": 0} | {state: 1}


def test_webhooks_and_requests_are_counted(scrape: Callable[[], dict[str, float]], database: Database) -> None:
    with database.sessions.begin() as session:
        owner = rows.project(session)
        endpoint = rows.endpoint(session, owner)
        rows.job(session, owner, State.SUCCEEDED)
        outbox.fan_out(session)
        gone = rows.endpoint(session, owner)
        gone.disabled_at, gone.disabled_reason = gone.created_at, "The receiver answered 410 Gone."
        session.flush()
        assert endpoint.id != gone.id
        model = rows.base(session).id
        usage = {"requests": 3, "prompt_tokens": 50, "completion_tokens": 7}
        session.add(ModelUsage(project_id=owner.id, day=date(2026, 1, 1), model_id=model, **usage))
    found = scrape()
    assert found['tunery_webhook_deliveries{state="pending"}'] == 1
    assert found['tunery_webhook_endpoints{status="active"}'] == 1
    assert found['tunery_webhook_endpoints{status="disabled"}'] == 1
    assert found["tunery_model_requests_total"] == 3
    assert found['tunery_model_tokens_total{kind="prompt"}'] == 50
    assert found['tunery_model_tokens_total{kind="completion"}'] == 7
