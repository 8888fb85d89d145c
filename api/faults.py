"""What is wrong with a request, in words that name the field and say what to change."""

import json
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from tunery.errors import InvalidValue, Rejected, TooLarge, TuneryError

_SHOWN = 80
_EXPLAINED = 100
_PLACES = {"body", "query", "path", "header"}
_MISSING = ("missing", "union_tag_not_found")
_NOT_OBJECTS = ("dict_type", "model_type", "model_attributes_type")
_NOT_JSON = (
    "The request has a body, but does not say that it is JSON. Send it with 'Content-Type: application/json' "
    "(curl -d alone sends a form)."
)


class RouteNotFound(TuneryError):
    """{what}"""

    code = "not_found"


class MethodNotAllowed(TuneryError):
    """Invalid method for URL ({route}). Use {allowed}."""

    code = "method_not_allowed"


class TooSlow(TuneryError):
    """The request's body came too slowly: {seen} bytes so far. Send it again, over a faster line or in smaller
    parts."""

    code = "request_timeout"


def explain(error: RequestValidationError) -> Rejected:
    """The first field at fault, with every reason that its value was refused for."""
    if isinstance(error.body, bytes):
        return InvalidValue(reason=_NOT_JSON)
    faults = error.errors()[:_EXPLAINED]
    path = _path(faults[0], error.body)
    same = [fault for fault in faults if _path(fault, error.body) == path]
    return InvalidValue(param=path or None, reason=_reason(same, path, error.body))


def _path(fault: dict[str, Any], body: Any) -> str:
    """The dotted path of a fault's field. pydantic also names the union's branch it tried; the body has no such key."""
    place, *steps = fault["loc"] if fault["loc"][0] in _PLACES else ("", *fault["loc"])
    if place != "body":
        return ".".join(str(step) for step in steps[:1])
    if fault["type"] == "union_tag_not_found":
        steps.append("type")  # what is missing; pydantic's path ends at the union
    path, here = [], body
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if isinstance(here, dict) and (step in here or (last and fault["type"] in _MISSING)):
            path.append(str(step))
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            path.append(str(step))
            here = here[step]
    return ".".join(path)


def _reason(faults: Sequence[dict[str, Any]], path: str, body: Any) -> str:
    kind = faults[0]["type"]
    if kind in _MISSING and not path:
        return "The request has no JSON body. Send one, with 'Content-Type: application/json'."
    if kind in _MISSING:
        choice = " (full, lora or qlora)" if path == "technique.type" else ""
        return f"Missing required parameter: '{path}'{choice}."
    if kind == "extra_forbidden":
        return _unknown(path, body)
    told = dict.fromkeys(_tell(fault) for fault in faults)
    return f"Invalid value for '{path or 'body'}' ({_shown(faults[0]['input'])}): {', or '.join(told)}."


def _unknown(path: str, body: Any) -> str:
    if path.startswith("technique.") and isinstance(body, dict):
        kind = body["technique"].get("type")
        knob = path.partition(".")[2]
        if kind == "full":
            return f"A full fine-tune has no '{knob}': remove '{path}', or set technique.type to 'lora' or 'qlora'."
        if kind == "lora":
            return f"LoRA has no '{knob}': remove '{path}' (see /docs for its knobs; 'qlora' has more)."
    return f"Unknown parameter: '{path}'. Remove it, or check its spelling against /docs."


def _tell(fault: dict[str, Any]) -> str:
    if fault["type"] in _NOT_OBJECTS:
        name, value = fault["loc"][-1], fault["input"]
        example = f', like {{"type": {json.dumps(value)}}}' if name == "technique" and isinstance(value, str) else ""
        return f"should be an object in braces{example}"
    text = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def explain_http(error: HTTPException, route: str) -> TuneryError:
    """What the framework refuses by itself: an unknown route, a wrong method, a body over the limit."""
    if error.status_code == 413:
        return TooLarge(what="The request's body", limit=error.detail, instead="Send less at once.")
    if error.status_code == 408:
        return TooSlow(seen=error.detail)
    if error.status_code == 405:
        return MethodNotAllowed(route=route, allowed=(error.headers or {}).get("Allow", "another method"))
    if error.status_code == 404:
        return RouteNotFound(what=f"Invalid URL ({route}). /docs lists this server's routes.")
    return InvalidValue(reason=str(error.detail))
