"""JSON bodies as RFC 8259 has them. Python's parser, which the framework uses, takes more than we could pass on: NaN,
nesting of any depth, halves of surrogate pairs; and it says little about what it does not take."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from tunery.rows import strict_json


class JsonRoute(APIRoute):
    """A route that reads JSON: `APIRouter(route_class=JsonRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handle_strictly


class _Request(Request):
    async def json(self) -> Any:
        # An HTTPException, because the framework puts an empty phrase in the place of every other error from here.
        try:
            return strict_json.load_object((await self.body()).decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise HTTPException(
                400, f"The request's body is not UTF-8 (byte {error.start + 1}). Save or send it as UTF-8."
            ) from None
        except ValueError as error:
            raise HTTPException(400, f"The request's body is not valid JSON: {error} Correct it and resend.") from None
