"""The check of the migrations that `make check` runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from cloned_databases import Database
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from tunery.datasets.model import FileReport
from tunery.keys import projects
from tunery.local import paths, schema
from tunery.local.postgres import Postgres

SECOND = """
revision = "zz"
down_revision = "0002"


def upgrade() -> None: ...


def downgrade() -> None: ...
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that the check reads."""
    without = shutil.ignore_patterns("__pycache__")
    for name in ("tunery", "migrations"):
        shutil.copytree(paths.root() / name, tmp_path / name, ignore=without)
    for name in ("api", "worker"):
        (tmp_path / name).mkdir()
    shutil.copy(paths.root() / "alembic.ini", tmp_path)
    return tmp_path


def test_two_migrations_after_one_fail_the_check(checkout: Path) -> None:
    schema.check_one_head(checkout / "migrations")
    (checkout / "migrations/versions/2026_12_01_zz_beside.py").write_text(SECOND)
    found = subprocess.run(
        [sys.executable, "-m", "tunery.local.schema"], cwd=checkout, capture_output=True, text=True, timeout=60
    )
    assert found.returncode != 0
    assert re.search(r"SeveralHeads: 2 migrations have no successor: \w+, zz\.", found.stderr)


def test_a_migrations_file_is_named_after_its_date_and_revision() -> None:
    for path in (paths.root() / "migrations/versions").glob("*.py"):
        revision = re.search(r'^revision = "(\w+)"$', path.read_text(), re.MULTILINE)
        assert revision
        assert re.fullmatch(rf"\d{{4}}_\d\d_\d\d_{revision[1]}_\w+", path.stem), path.name


def test_a_database_with_reports_by_columns_goes_back_to_the_release_before(database: Database) -> None:
    """The release before has one report of a content, base and comparison: the plain one stays."""
    with database.sessions.begin() as session:
        project = projects.create_project(session, "p")
        for columns in ({}, {"text": "a"}, {"text": "b"}):
            session.add(FileReport(id=str(columns), project_id=project.id, sha256="x", version=1, columns=columns))
            session.flush()
    with pytest.raises(IntegrityError), database.sessions.begin() as session:
        session.add(FileReport(id="twice", project_id=project.id, sha256="x", version=1, columns={"text": "b"}))
    command.downgrade(schema._config(database.url), "0020")
    with database.sessions.begin() as session:
        assert session.scalars(text("SELECT id FROM file_reports")).all() == ["{}"]
    kept = "project_id, sha256, base, against, version, status, progress, tries"
    with pytest.raises(IntegrityError), database.sessions.begin() as session:
        session.execute(text(f"INSERT INTO file_reports (id, {kept}) SELECT 'twice', {kept} FROM file_reports"))
    schema.upgrade(database.url)
    with database.sessions.begin() as session:
        assert [report.columns for report in session.scalars(select(FileReport))] == [{}]


@pytest.mark.parametrize(
    ("before", "index"),
    [("0018", "ix_jobs_measured ON jobs (id)"), ("0021", "uq_file_reports_content ON file_reports (id)")],
)
def test_an_upgrade_that_was_given_up_is_run_again(database: Database, before: str, index: str) -> None:
    """CREATE INDEX CONCURRENTLY has no transaction: where it gives up on a lock, its index stays and is not valid."""
    command.downgrade(schema._config(database.url), before)
    with database.sessions.begin() as session:
        session.execute(text(f"CREATE INDEX {index}"))
    schema.upgrade(database.url)
    schema.compare(database.url)


@pytest.mark.slow  # three processes create all tables
def test_services_that_start_together_upgrade_one_after_the_other(tmp_path: Path) -> None:
    """CREATE INDEX CONCURRENTLY waits for other sessions' statements: these must not be waiting for the upgrade."""
    server = Postgres(tmp_path / "postgres", durable=False).start()
    try:
        upgrade = f"from tunery.local import schema; schema.upgrade({server.url()!r})"
        together = [subprocess.Popen([sys.executable, "-c", upgrade], cwd=paths.root()) for _ in range(3)]
        assert [process.wait(timeout=300) for process in together] == [0, 0, 0]
        schema.compare(server.url())
    finally:
        server.remove()
