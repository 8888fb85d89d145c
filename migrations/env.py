"""Runs migrations one at a time: an advisory lock for the whole run, one transaction and short timeouts for each.

A migration must work beside the code that is running already: first add, later remove.
"""

import time

from alembic import context
from sqlalchemy import Connection, create_engine, pool, text

import tunery.artifacts.model
import tunery.baselines.model
import tunery.datasets.model
import tunery.jobs.model
import tunery.keys.model
import tunery.models.model
import tunery.traffic.model
import tunery.webhooks.model  # noqa: F401  importing is what registers the tables
from tunery.db import Base
from tunery.settings import settings_or_exit

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


url = context.config.get_main_option("sqlalchemy.url") or settings_or_exit().database_url
with create_engine(url, poolclass=pool.NullPool).connect() as connection:
    _run_alone(connection)
