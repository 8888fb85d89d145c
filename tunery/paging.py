"""Keyset paging: stable while rows are added, because a page begins after a row and not after a number of rows."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from sqlalchemy import ColumnElement, Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from tunery.errors import NotFound

Row = TypeVar("Row")
Order = Literal["asc", "desc"]


def page(
    session: Session,
    owned: Select[Row],
    *shown: ColumnElement[bool],
    by: Sequence[InstrumentedAttribute[Any]],
    id: InstrumentedAttribute[str],
    kind: str,
    after: str | None,
    limit: int,
    order: Order = "desc",
) -> tuple[list[Row], bool]:
    """Returns one page of the `owned` rows that meet every `shown`, and whether more follow.

    `by` is the sort key, whose columns are together unique. `after` is the id of the last row of the page before.
    Raises NotFound with `kind` when `after` is none of the `owned` rows.
    """
    query = owned.where(*shown)
    key = tuple_(*by)
    if after is not None:
        # Not in `query`: a row deleted after its page was read must still be found, so that code which deletes while
        # it lists reaches the end.
        start = session.execute(owned.with_only_columns(*by).where(id == after)).one_or_none()
        if start is None:
            raise NotFound(kind=kind, id=after, param="after")
        query = query.where(key < tuple(start) if order == "desc" else key > tuple(start))
    columns = [column.desc() if order == "desc" else column.asc() for column in by]
    rows = list(session.scalars(query.order_by(*columns).limit(limit + 1)))
    return rows[:limit], len(rows) > limit
