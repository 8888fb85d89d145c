"""Renders the views of several rows in a few requests to the renderer, before the rows are encoded."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from tunery.errors import Unavailable
from tunery.rows.turns import View, Views

Asked = tuple[Views, Sequence[View]]


def fill(
    rows: Sequence[Asked],
    variables: Callable[[Views, Sequence[View]], list[dict[str, Any]]],
    render: Callable[[list[dict[str, Any]], bool], list[str]],
) -> None:
    """Fills the rows' views, calling `render` once for rows without tools and once for rows with. Raises Unavailable.

    On any other error nothing is filled: each row is then rendered alone, and the error is reported for its row.
    """
    for with_tools in (False, True):
        some = [row for row in rows if bool(row[0].tools) == with_tools]
        texts = iter(_rendered([one for row in some for one in variables(*row)], with_tools, render))
        for views, asked in some:
            views.fill(dict(zip(asked, _taken(texts, len(asked)), strict=False)))


def _taken(texts: Iterator[str], count: int) -> list[str]:
    return list(islice(texts, count))


def _rendered(
    variables: list[dict[str, Any]], with_tools: bool, render: Callable[[list[dict[str, Any]], bool], list[str]]
) -> list[str]:
    try:
        return render(variables, with_tools) if variables else []
    except Unavailable:
        raise
    except Exception:  # noqa: BLE001  a template is a program: it can fail in any way that Python can
        return []
