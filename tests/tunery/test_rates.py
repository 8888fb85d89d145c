"""Rate limits of a project: token buckets that all processes share."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import rows
from cloned_databases import Database
from sqlalchemy import func, update

from tunery.traffic import rates
from tunery.traffic.errors import RateLimited
from tunery.traffic.model import RequestRate
from tunery.traffic.rates import Bucket


def test_a_bucket_refills_continuously_up_to_its_limit() -> None:
    bucket = Bucket.full(60).without(60)
    assert bucket.seconds_until(1) == 1
    assert bucket.after(0.5).left == 0.5
    assert bucket.after(1000).left == 60
    assert bucket.after(-5).left == 0, "a clock that is set back takes nothing"


def test_a_bucket_without_limit_is_never_empty_and_one_of_nothing_never_full() -> None:
    assert Bucket(None).without(10**9).seconds_until(10**9) == 0
    assert Bucket.full(0).after(10**9).seconds_until(1) == float("inf")


def later(database: Database, seconds: float) -> None:
    """Moves the time of every bucket `seconds` into the past."""
    with database.sessions.begin() as session:
        session.execute(update(RequestRate).values(at=RequestRate.at - func.make_interval(0, 0, 0, 0, 0, 0, seconds)))


@pytest.fixture
def project_id(database: Database) -> str:
    with database.sessions.begin() as session:
        return rows.project(session, requests_per_minute=6, tokens_per_minute=100).id


def take(database: Database, project_id: str, tokens: int) -> rates.Standing:
    with database.sessions.begin() as session:
        return rates.take(session, database.settings, project_id, tokens)


def test_requests_come_back_with_time(database: Database, project_id: str) -> None:
    for _ in range(6):
        take(database, project_id, 1)
    with pytest.raises(RateLimited, match=r"6 requests per minute.*in 10 s"):
        take(database, project_id, 1)
    later(database, 10)
    assert take(database, project_id, 1).requests.left < 1


def test_tokens_are_settled_by_what_was_used(database: Database, project_id: str) -> None:
    standing = take(database, project_id, 90)
    with pytest.raises(RateLimited, match="100 tokens per minute"):
        take(database, project_id, 20)
    with database.sessions.begin() as session:
        rates.charge_used(session, database.settings, project_id, charged=standing.charged, used=10)
    assert take(database, project_id, 20).tokens.left == pytest.approx(70, abs=2)
    with database.sessions.begin() as session:
        rates.charge_used(session, database.settings, project_id, charged=20, used=220)
    with pytest.raises(RateLimited, match="tokens per minute"):  # a longer answer leaves a debt
        take(database, project_id, 1)


def test_a_request_of_more_than_a_minutes_tokens_takes_a_full_bucket(database: Database, project_id: str) -> None:
    assert take(database, project_id, 10**9).charged == 100


def test_a_refused_request_takes_nothing(database: Database, project_id: str) -> None:
    take(database, project_id, 100)
    with pytest.raises(RateLimited):
        take(database, project_id, 100)
    later(database, 60)
    assert take(database, project_id, 100).requests.left == pytest.approx(5, abs=0.1)


def test_processes_share_a_bucket(database: Database, project_id: str) -> None:
    def try_one(_: int) -> bool:
        try:
            take(database, project_id, 1)
        except RateLimited:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(try_one, range(24))) == 6


def test_a_projects_own_rate_replaces_the_common_one(database: Database, project_id: str) -> None:
    settings = database.settings.model_copy(update={"requests_per_minute": 1, "tokens_per_minute": 1})
    with database.sessions.begin() as session:
        other = rows.project(session).id
        assert rates.take(session, settings, project_id, 5).requests.limit == 6
        assert rates.take(session, settings, other, 5).charged == 1
        with pytest.raises(RateLimited):
            rates.take(session, settings, other, 5)
