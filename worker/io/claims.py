"""Claims long work for one process of the installation, without a lock on any row."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import func, select

from tunery import db


@contextmanager
def advisory_lock(what: str) -> Iterator[bool]:
    """Takes PostgreSQL's advisory lock of `what`; yields whether it was free. It ends with the process's connection.

    A row lock instead would make the row's owner wait, with a cancel or a delete; an open transaction would hold up
    PostgreSQL's vacuum.
    """
    key = func.hashtextextended(f"tunery {what}", 0)
    engine = db.sessions().kw["bind"]
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not connection.scalar(select(func.pg_try_advisory_lock(key))):
            yield False
            return
        try:
            yield True
        finally:
            connection.execute(select(func.pg_advisory_unlock(key)))


def take_one(verb: str, waiting: Callable[[], list[str]], work: Callable[[str], None]) -> bool:
    """Does `work` on the first of the `waiting` ids that no other process holds; returns whether there was one."""
    for id in waiting():
        with advisory_lock(f"{verb} {id}") as mine:
            if mine and id in waiting():  # another process may have finished it meanwhile
                work(id)
                return True
    return False
