"""Converts the framework's errors about a request to this project's."""

from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from tunery import field_errors
from tunery.errors import InvalidValue, Rejected, TooLarge, TuneryError

_NOT_JSON = (
    "The request's body is not declared as JSON. Send it with 'Content-Type: application/json' "
    "(curl -d alone sends a form)."
)


class RouteNotFound(TuneryError):
    """{what}"""

    code = "not_found"


class MethodNotAllowed(TuneryError):
    """Invalid method for URL ({route}). Use {allowed}."""

    code = "method_not_allowed"


class TooSlow(TuneryError):
    """The request's body arrived too slowly ({seen} bytes so far). Send it again over a faster connection or in smaller
    parts."""

    code = "request_timeout"


def explain(error: RequestValidationError, known: Any = None) -> Rejected:
    """Returns the error for the first invalid field, with all reasons.

    `known`: the type of the body, of which a field is suggested for an unknown one.
    """
    if isinstance(error.body, bytes):
        return InvalidValue(reason=_NOT_JSON)
    return field_errors.explain(error.errors(), error.body, known)


def explain_http(error: HTTPException, route: str) -> TuneryError:
    """Returns the error for what the framework itself refuses: an unknown route, a wrong method, too large a body."""
    if error.status_code == 413:
        return TooLarge(what="The request's body", limit=error.detail, instead="Send less at once.")
    if error.status_code == 408:
        return TooSlow(seen=error.detail)
    if error.status_code == 405:
        return MethodNotAllowed(route=route, allowed=(error.headers or {}).get("Allow", "another method"))
    if error.status_code == 404:
        return RouteNotFound(what=f"Invalid URL ({route}). /docs lists this server's routes.")
    return InvalidValue(reason=str(error.detail))
