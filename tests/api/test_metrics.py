"""Prometheus metrics: how far runs were from their quotes."""

import rows
from cloned_databases import Database
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session
from teams import Team

from tunery.jobs.states import State
from tunery.keys import auth


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
    name = "tunery_job_seconds_over_quoted"
    for bucket, count in {"0.9": 0, "1": 1, "1.1": 2, "1.2": 3, "2": 3, "4": 4, "+Inf": 4}.items():
        assert f'{name}_bucket{{speed_from="same",le="{bucket}"}} {count}' in lines
    assert f'{name}_sum{{speed_from="same"}} 6.2' in lines
    assert f'{name}_count{{speed_from="same"}} 4' in lines
    assert f'{name}_bucket{{speed_from="estimated",le="4"}} 0' in lines
    assert 'tunery_jobs_in_quoted_range{speed_from="same"} 3' in lines
    assert 'tunery_jobs_in_quoted_range{speed_from="estimated"} 0' in lines
    assert len(lines) == 4 + 2 * 13 + 2
