"""The database: the declarative base, one engine per process, and transactions."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any

from psycopg.errors import UndefinedColumn, UndefinedTable
from sqlalchemy import DateTime, Engine, MetaData, Text, cast, create_engine, event, func, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase, MappedColumn, Session, mapped_column, sessionmaker

from tunery.errors import NotMigrated
from tunery.settings import get_settings

NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """The base of all tables. Times are `timestamptz` from the database's clock; free-form values are `jsonb`."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {datetime: DateTime(timezone=True), dict[str, Any]: JSONB, list[Any]: JSONB}


def creation_time() -> MappedColumn[datetime]:
    """Returns a creation time: the statement's own time, so that rows of one transaction keep their order."""
    return mapped_column(server_default=func.clock_timestamp())


CONNECTION = {
    # An unanswered packet is an error after half a minute, not after TCP's default of a quarter of an hour: a worker
    # that loses its network must notice while its lease can still be renewed.
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    # The longest time that a stopped or disconnected process keeps its locks in an open transaction.
    "options": "-c idle_in_transaction_session_timeout=300s",
}
"""libpq's options for every connection."""

UNREACHABLE = (OperationalError, InterfaceError, PoolTimeout, NotMigrated)
"""Exceptions of a database that is down, restarting, unreachable or not migrated yet: a later try may succeed."""


def make_engine(url: str) -> Engine:
    """Returns an engine that tests a connection before it is used, so that a restart costs no request."""
    engine = create_engine(
        url,
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=20,
        pool_timeout=10,
        connect_args=CONNECTION,
        # Parameters include training rows and models' answers, which must not get into the log with an error.
        hide_parameters=True,
    )
    event.listen(engine, "handle_error", _name_what_a_retry_may_fix)
    return engine


def reason_of(error: Exception) -> str:
    """Returns the first line of what the driver or the exception says, for logs and messages."""
    said = str(getattr(error, "orig", None) or error).strip()
    return said.splitlines()[0].rstrip(".") if said else type(error).__name__


def _is_ours(error: UndefinedTable | UndefinedColumn) -> bool:
    """Whether this release has the table or column that is missing: else the statement is wrong, and stays so.

    The server quotes names in its message, whatever its language, and has no field for these.
    """
    tables = Base.metadata.tables.values()
    missing = isinstance(error, UndefinedTable)
    known = {table.name for table in tables} if missing else {c.name for table in tables for c in table.columns}
    return not known.isdisjoint(re.findall(r"\w+", error.diag.message_primary or ""))


def _name_what_a_retry_may_fix(context: ExceptionContext) -> None:
    """Raises NotMigrated for a missing table or column, and OperationalError for connections that the server ended. The
    driver raises an InternalError (idle in a transaction), as for corrupt indexes; this way UNREACHABLE covers
    everything that a retry may fix."""
    error = context.original_exception
    if isinstance(error, UndefinedTable | UndefinedColumn) and _is_ours(error):
        raise NotMigrated(reason=reason_of(error)) from error
    if context.is_disconnect and not isinstance(context.sqlalchemy_exception, OperationalError):
        raise OperationalError(context.statement, None, error, hide_parameters=True, connection_invalidated=True)


def make_sessions(engine: Engine) -> sessionmaker[Session]:
    return sessionmaker(engine, expire_on_commit=False)


@lru_cache
def sessions() -> sessionmaker[Session]:
    """Returns the process's session factory, on TUNERY_DATABASE_URL."""
    return make_sessions(make_engine(get_settings().database_url))


# A forked child must not share its parent's connections.
os.register_at_fork(after_in_child=sessions.cache_clear)


@contextmanager
def transaction() -> Iterator[Session]:
    """Opens a transaction of a worker or a command: commits at the end, rolls back on an error."""
    with sessions().begin() as session:
        yield session


def transaction_id(session: Session) -> str | None:
    """Returns PostgreSQL's id of the session's transaction; None until it has written something."""
    return session.scalar(select(cast(func.pg_current_xact_id_if_assigned(), Text)))


def is_committed(session: Session, transaction_id: str) -> bool | None:
    """Whether a transaction whose answer to COMMIT was lost was committed; None if that is not decided yet."""
    status = session.scalar(select(func.pg_xact_status(text("CAST(:id AS xid8)").bindparams(id=transaction_id))))
    return None if status == "in progress" else status == "committed"


def now(session: Session) -> datetime:
    """Returns the database's time, which is the only clock used for leases."""
    at: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return at
