"""Runs migrations one at a time: an advisory lock for the whole run, one transaction and short timeouts for each.

A migration must work beside the code that is running already: first add, later remove.
"""

import time

from alembic import context
from sqlalchemy import Connection, create_engine, pool, text
from sqlalchemy.exc import OperationalError

import tunery.artifacts.model
import tunery.baselines.model
import tunery.datasets.model
import tunery.jobs.model
import tunery.keys.model
import tunery.models.model
import tunery.traffic.model
import tunery.webhooks.model  # noqa: F401  importing is what registers the tables
from tunery.db import Base, reason_of
from tunery.errors import WrongSettings
from tunery.settings import ending_if_wrong, settings_or_exit

MIGRATION_LOCK = 7_214_000
# A migration that waits for a lock makes every request behind it wait too: give up early, and let the operator retry.
TIMEOUTS = "SET lock_timeout = '10s'; SET statement_timeout = '10min'"


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transaction_per_migration=True,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def _run_alone(connection: Connection) -> None:
    # Why not pg_advisory_lock: an index that is made concurrently waits for every open statement, also for this one.
    while not connection.scalar(text(f"SELECT pg_try_advisory_lock({MIGRATION_LOCK})")):
        connection.rollback()
        time.sleep(0.2)
    connection.execute(text(TIMEOUTS))
    connection.commit()
    try:
        _run(connection)
    finally:
        connection.rollback()
        connection.execute(text(f"SELECT pg_advisory_unlock({MIGRATION_LOCK})"))
        connection.commit()


def _migrate(url: str) -> None:
    with create_engine(url, poolclass=pool.NullPool).connect() as connection:
        _run_alone(connection)


def _migrate_or_exit() -> None:
    """Migrates TUNERY_DATABASE_URL. A database that is down, or a lock that is held, ends the command with one line."""
    with ending_if_wrong():
        try:
            _migrate(settings_or_exit().database_url)
        except OperationalError as error:
            rest = "What was migrated before stays. Once the cause is gone, run the command again"
            why = f"The database at TUNERY_DATABASE_URL was not migrated: {reason_of(error)}. {rest}."
            raise WrongSettings(lines=why) from error


if given := context.config.get_main_option("sqlalchemy.url"):
    _migrate(given)
else:
    _migrate_or_exit()
