"""Refuses query parameters that a route does not have, which the framework ignores.

A filter or a limit that is misspelt would otherwise silently select something else.
"""

import difflib
from collections import Counter

from fastapi import Request
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query
from fastapi.routing import APIRoute

from tunery.errors import InvalidValue

_SHOWN = 40
OF_AZURE = "api-version"
"""The parameter that Azure's client sends with every request."""
NOT_AZURE = (
    "This server has OpenAI's API and not Azure's, whose routes and key header differ: use the client "
    "OpenAI(base_url='http://HOST/v1', api_key=...) in place of AzureOpenAI."
)


def check(request: Request) -> None:
    """Raises InvalidValue for an unknown query parameter, and for one that is given twice.

    Routes that only say what is not supported are left out.
    """
    route = request.scope["route"]
    if not request.url.query or not isinstance(route, APIRoute) or not route.include_in_schema:
        return
    known = _known(route)
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if name not in known and not _is_part(name, known):
            raise _unknown(name, known)
        if count > 1 and not name.endswith("[]"):
            reason = f"The query parameter '{name}' is given {count} times. Send it once."
            raise InvalidValue(param=name, reason=reason)


def _known(route: APIRoute) -> tuple[str, ...]:
    """Returns the names of a route's query parameters."""
    fields = get_flat_params(route.dependant)
    return tuple(field.alias for field in fields if isinstance(field.field_info, Query))


def _is_part(name: str, known: tuple[str, ...]) -> bool:
    """Whether it is a pair of an object, such as `metadata[key]`."""
    return name.startswith("metadata[") and name.endswith("]") and "metadata" in known


def _unknown(name: str, known: tuple[str, ...]) -> InvalidValue:
    shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    if name == OF_AZURE:
        instead = NOT_AZURE
    elif close := difflib.get_close_matches(name[:_SHOWN].lower(), known, n=1):
        instead = f"Did you mean '{close[0]}'?"
    elif known:
        instead = f"This route has {', '.join(known)}."
    else:
        instead = "This route has none: remove it."
    return InvalidValue(param=shown, reason=f"Unknown query parameter: '{shown}'. {instead}")
