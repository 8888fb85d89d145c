"""Reads JSON bodies strictly by RFC 8259. The framework's parser, Python's own, accepts what cannot be passed on: NaN,
nesting of any depth, lone surrogates; and its errors say little.

A body is read only for a caller with a key, up to its route's limit, and parsed in a thread. Parsing and checking hold
the GIL and so block all other requests even in a thread, so the number of values is limited too.
"""

import re
import threading
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from typing import Any, ClassVar

from fastapi import HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from api import middleware, request_errors
from tunery.errors import TooLarge
from tunery.keys import auth
from tunery.rows import strict_json
from tunery.settings import Settings

_TOKENS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[,{\[]', re.DOTALL)
"""Strings, which may hold anything, and what comes before each value."""


_LONG_BYTES = 2**17
_LONG_ONES = threading.Lock()
"""Long bodies are parsed one at a time, as each blocks the event loop while it is parsed."""


class JsonRoute(APIRoute):
    """A route that reads JSON: `APIRouter(route_class=JsonRoute)`."""

    most_values: ClassVar[int] = 10_000
    """Members, items and containers. Each that is refused is an error of its own, a hundred times its parsing."""

    @staticmethod
    def limit(settings: Settings) -> int:
        """Returns the most bytes of a body."""
        return settings.max_json_bytes

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            if self.body_field is not None:
                await run_in_threadpool(_authenticate, request)
                _limit(request, self.limit(request.app.state.settings))
            try:
                return await handle(_Request(request.scope, request.receive, self.most_values))
            except RequestValidationError as error:  # here, as the route knows what its body may have
                known = self.body_field.field_info.annotation if self.body_field is not None else None
                raise request_errors.explain(error, known) from error

        return handle_strictly


class LongJsonRoute(JsonRoute):
    """One whose bodies hold texts of people: conversations, templates."""

    most_values = 50_000

    @staticmethod
    def limit(settings: Settings) -> int:
        return settings.max_chat_bytes


def _authenticate(request: Request) -> None:
    """Raises Unauthenticated. The route's own dependency checks again, in the request's transaction."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    with request.app.state.sessions.begin() as session:
        auth.authenticate(session, secret.strip() if scheme.lower() == "bearer" else None)


def _limit(request: Request, limit: int) -> None:
    if int(request.headers.get("content-length", 0)) > limit:
        raise TooLarge(what="The request's body", limit=limit, instead="Send less at once.")
    middleware.allow(request, limit)


class _Request(Request):
    def __init__(self, scope: Any, receive: Any, most_values: int) -> None:
        super().__init__(scope, receive)
        self._most_values = most_values

    async def json(self) -> Any:
        return await run_in_threadpool(_parse, await self.body(), self._most_values)


def _parse(body: bytes, most_values: int) -> Any:
    with _LONG_ONES if len(body) > _LONG_BYTES else nullcontext():
        return _parse_now(body, most_values)


def _parse_now(body: bytes, most_values: int) -> Any:
    # HTTPExceptions, because the framework puts an empty phrase in the place of every other error from here.
    try:
        text = body.decode("utf-8-sig")
        if not _has_at_most(text, most_values):
            reason = f"it has more than {most_values:,} values, the limit."
            raise HTTPException(400, f"The request's body is too large: {reason} Send less at once.")
        return strict_json.load_object(text)
    except UnicodeDecodeError as error:
        raise HTTPException(
            400, f"The request's body is not UTF-8 (byte {error.start + 1}). Save or send it as UTF-8."
        ) from None
    except ValueError as error:
        raise HTTPException(400, f"The request's body is not valid JSON: {error} Correct it and resend.") from None


def _has_at_most(text: str, most: int) -> bool:
    """Whether a JSON text has so many values, as far as needed to know."""
    if text.count(",") + text.count("{") + text.count("[") <= most:
        return True
    count = 0
    for token in _TOKENS.finditer(text):
        count += text[token.start()] != '"'
        if count > most:
            return False
    return True
