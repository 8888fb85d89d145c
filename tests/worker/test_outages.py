"""What keeps a worker from its work is logged when it begins and when it ends, not at every try."""

import logging
from collections.abc import Callable

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from tunery import db
from tunery.storage.errors import StorageFailed
from worker.outages import Outages

AWAY = "postgresql+psycopg://nobody@127.0.0.1:1/none"


def _ask(url: str, statement: str = "SELECT 1") -> None:
    engine = db.make_engine(url)
    try:
        with engine.connect() as connection:
            connection.execute(text(statement))
    finally:
        engine.dispose()


@pytest.fixture
def outages(caplog: pytest.LogCaptureFixture) -> Outages:
    caplog.set_level(logging.INFO)
    return Outages()


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns what was logged about outages; other threads of the tests' process may log, too."""
    return [record.getMessage() for record in caplog.records if record.name == "worker.outages"]


def test_many_tries_of_several_pollers_make_two_lines(
    outages: Outages, caplog: pytest.LogCaptureFixture, postgres: Callable[[str], str]
) -> None:
    for _ in range(3):
        for poller in ("a", "b"):
            with outages.survived(poller):
                _ask(AWAY)
    for poller in ("a", "b"):
        with outages.survived(poller):
            _ask(postgres("postgres"))
    begins, ends = _said(caplog)
    assert begins.startswith("a waits, and is tried again: connection failed: ")
    assert "Connection refused" in begins
    assert ends.startswith("b goes on")
    assert "Traceback" not in caplog.text
    with outages.survived("a"):
        _ask(AWAY)
    assert len(_said(caplog)) == 3, "the next outage is another one"


def test_each_reason_has_its_line(
    outages: Outages, caplog: pytest.LogCaptureFixture, postgres: Callable[[str], str]
) -> None:
    for _ in range(2):
        with outages.survived("a"):
            _ask(postgres("postgres"), "SELECT id FROM jobs")
        with outages.survived("b"):
            raise StorageFailed(action="list", reason="for the test")
    migrate, storage = _said(caplog)
    assert "`alembic upgrade head`" in migrate
    assert "could not list (for the test)" in storage


def test_an_unexpected_error_keeps_its_traceback(outages: Outages, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        with outages.survived("a"):
            raise ZeroDivisionError
    assert caplog.text.count("Traceback") == 2


@pytest.mark.parametrize("statement", ["SELECT 1 FROM jbos", "SELECT stat FROM pg_class"])
def test_a_wrong_statement_is_no_missing_migration(
    statement: str, outages: Outages, caplog: pytest.LogCaptureFixture, postgres: Callable[[str], str]
) -> None:
    """No migration mends it: a run that waited for one would hold its GPU forever."""
    with outages.survived("a"):
        _ask(postgres("postgres"), statement)
    assert "Traceback" in caplog.text
    with pytest.raises(ProgrammingError):
        _ask(postgres("postgres"), statement)
