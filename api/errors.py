"""Turns errors into HTTP answers: class -> status, one envelope, one handler.

Never 409, which OpenAI's clients retry. A request that the object's state forbids is a 400, as in OpenAI's API.
"""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from psycopg.errors import NumericValueOutOfRange
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from api import query, rate_headers, request_errors
from tunery import errors
from tunery.db import UNREACHABLE, reason_of
from tunery.errors import TuneryError
from tunery.jobs.errors import QuotaExceeded
from tunery.keys.errors import Forbidden, Unauthenticated
from tunery.traffic.errors import RateLimited, TooManyOpen

log = logging.getLogger(__name__)

STATUS: dict[type[TuneryError], int] = {
    errors.Rejected: 400,
    Unauthenticated: 401,
    Forbidden: 403,
    errors.NotFound: 404,
    request_errors.RouteNotFound: 404,
    request_errors.MethodNotAllowed: 405,
    request_errors.TooSlow: 408,
    errors.TooLarge: 413,
    QuotaExceeded: 429,
    RateLimited: 429,
    TooManyOpen: 429,
    errors.Overloaded: 429,
    errors.Unavailable: 503,
    errors.AnswerTooSlow: 504,
}
"""A class covers its subclasses. Anything else is an internal error: 500."""

_NOT_AGAIN = {"x-should-retry": "false"}
_HEADERS: dict[type[TuneryError], dict[str, str]] = {
    Unauthenticated: {"www-authenticate": "Bearer"},
    request_errors.TooSlow: {"connection": "close"},
    QuotaExceeded: _NOT_AGAIN,  # a full queue does not empty in the seconds a client waits
    TooManyOpen: {"retry-after": "1"},
    errors.Unavailable: {"retry-after": "5"},
    errors.AnswerTooSlow: _NOT_AGAIN,  # the same request would take as long
}

_FORESEEN = (
    TuneryError,
    RequestValidationError,
    HTTPException,
    DataError,
    UnicodeEncodeError,
    *UNREACHABLE,
)


def status_of(error: TuneryError) -> int:
    """Returns the status of the nearest class above the error that has one."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def _headers_of(error: TuneryError) -> dict[str, str]:
    if isinstance(error, RateLimited):
        return {"retry-after": str(error.fields["seconds"]), **rate_headers.of(error.fields["standing"])}
    return next((_HEADERS[kind] for kind in type(error).__mro__ if kind in _HEADERS), {})


def envelope(message: str, *, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Returns the body of every error, all four keys always there."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def _type_of(error: TuneryError, status: int) -> str:
    if isinstance(error, RateLimited):
        return str(error.fields["unit"])  # `requests` or `tokens`, as OpenAI has it
    if status == 429:
        return error.code
    return "invalid_request_error" if status < 500 else "server_error"


def _as_ours(error: Exception, route: str) -> TuneryError | None:
    """Converts any exception to a TuneryError; None for an unexpected one."""
    if isinstance(error, TuneryError) and status_of(error) != 500:
        return error
    if isinstance(error, RequestValidationError):
        return request_errors.explain(error)
    if isinstance(error, HTTPException):
        return request_errors.explain_http(error, route)
    if isinstance(error, DataError) and isinstance(error.orig, NumericValueOutOfRange):
        reason = "A number in the request is too large: integers must be between -2**63 and 2**63 - 1."
        return errors.InvalidValue(reason=reason)
    if isinstance(error, DataError | UnicodeEncodeError):
        # PostgreSQL is the judge of what it can keep: NUL characters and halves of surrogate pairs it cannot.
        reason = "The request contains a NUL character or half a surrogate pair (\\u0000, \\ud800-\\udfff). Remove it."
        return errors.InvalidValue(reason=reason)
    if isinstance(error, UNREACHABLE):
        return errors.Unavailable(part="The database")
    return None


def answer(error: Exception, *, request_id: str, route: str) -> JSONResponse:
    """Returns the HTTP answer to an error; `route` is the method and path, for messages."""
    ours = _as_ours(error, route)
    if ours is None:
        log.error("%s: %s failed", request_id, route, exc_info=error)
        text = (
            f"The server failed to process this request. Send its id, {request_id}, to the operator, who finds the "
            "reason in the log."
        )
        return JSONResponse(envelope(text, type="server_error", code="server_error"), 500)
    status = status_of(ours)
    if status >= 500:
        log.warning("%s: %s failed: %s", request_id, route, reason_of(error))
    headers = {**_headers_of(ours), **(getattr(error, "headers", None) or {})}
    body = envelope(ours.message, type=_type_of(ours, status), param=ours.param, code=ours.code)
    return JSONResponse(body, status, headers)


def _handle(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException) and error.status_code == 405:
        error.headers = {"Allow": ", ".join(_allowed(request))}
    url = request.url.path
    if isinstance(error, HTTPException) and error.status_code == 404 and (meant := _meant(request)):
        error = request_errors.RouteNotFound(what=f"Invalid URL ({request.method} {url}). Did you mean {meant}?")
    elif query.OF_AZURE in request.query_params:
        error = _for_azure(error, f"{request.method} {url}")
    request_id = request.scope.get("state", {}).get("request_id", "-")
    return answer(error, request_id=request_id, route=f"{request.method} {request.url.path}")


def _meant(request: Request) -> str | None:
    """Returns the route's path for one that lacks `/v1`, or ends with a slash too many."""
    bare = request.url.path.rstrip("/")
    return next((path for path in (bare, f"/v1{bare}") if _exists(request, request.method, path)), None)


def _for_azure(error: Exception, route: str) -> Exception:
    """Returns the error with what to change where Azure's client has a route or a key header of its own."""
    if isinstance(error, Unauthenticated):
        return Unauthenticated(message=f"{error.message} {query.NOT_AZURE}")
    if isinstance(error, HTTPException) and error.status_code == 404:
        return request_errors.RouteNotFound(what=f"Invalid URL ({route}). {query.NOT_AZURE}")
    return error


def _allowed(request: Request) -> list[str]:
    """Returns the methods of all routes at the request's path: the framework tells those of the first route only."""
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
    return [method for method in methods if _exists(request, method, request.scope["path"])]


def _exists(request: Request, method: str, path: str) -> bool:
    """Returns whether the application has a route with this method at this path."""
    place = {"type": "http", "root_path": request.scope["root_path"], "path": path, "method": method}
    return any(route.matches(place)[0] is Match.FULL for route in request.app.routes)


def install(app: FastAPI) -> None:
    """Installs one handler for all errors. `api.middleware` answers those raised outside of it in the same way."""
    for kind in _FORESEEN:
        app.add_exception_handler(kind, _handle)
