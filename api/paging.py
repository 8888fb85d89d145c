"""Cursors: stable when rows arrive meanwhile, because a page begins after a row and not after a number of rows."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from tunery.errors import NotFound

Row = TypeVar("Row")
Order = Literal["asc", "desc"]


def page(
    session: Session,
    query: Select[Row],
    *,
    by: Sequence[InstrumentedAttribute[Any]],
    id: InstrumentedAttribute[str],
    after: str | None,
    limit: int,
    order: Order = "desc",
) -> tuple[list[Row], bool]:
    """One page of `query`, ordered by the columns `by` (together unique), and whether more rows follow.

    `after` is the id of the row before the page, looked up in `query` itself: what the caller may not see cannot be a
    cursor either. Raises NotFound.
    """
    key = tuple_(*by)
    if after is not None:
        start = session.execute(query.with_only_columns(*by).where(id == after)).one_or_none()
        if start is None:
            raise NotFound(kind="object to go on after", id=after, param="after")
        query = query.where(key < tuple(start) if order == "desc" else key > tuple(start))
    columns = [column.desc() if order == "desc" else column.asc() for column in by]
    rows = list(session.scalars(query.order_by(*columns).limit(limit + 1)))
    return rows[:limit], len(rows) > limit
