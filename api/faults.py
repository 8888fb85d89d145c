"""What is wrong with a request, in words that name the field and say what to change."""

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from tunery.errors import InvalidValue, Rejected, RouteNotFound, TooLarge, TuneryError

_SHOWN = 80
_PLACES = {"body", "query", "path", "header"}


def explain(error: RequestValidationError) -> Rejected:
    """The first field at fault, with every reason that its value was refused for."""
    faults = error.errors()
    path = _path(faults[0], error.body)
    same = [fault for fault in faults if _path(fault, error.body) == path]
    return InvalidValue(param=path or None, reason=_reason(same, path, error.body))


def _path(fault: dict[str, Any], body: Any) -> str:
    """The dotted path of a fault's field. pydantic also names the union's branch it tried; the body has no such key."""
    place, *steps = fault["loc"] if fault["loc"][0] in _PLACES else ("", *fault["loc"])
    if place != "body":
        return ".".join(str(step) for step in steps[:1])
    path, here = [], body
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if isinstance(here, dict) and (step in here or (last and fault["type"] == "missing")):
            path.append(str(step))
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            path.append(str(step))
            here = here[step]
    return ".".join(path)


def _reason(faults: Sequence[dict[str, Any]], path: str, body: Any) -> str:
    kind = faults[0]["type"]
    if kind == "json_invalid":
        at = faults[0]["loc"][-1]
        return (
            f"The request's body is not valid JSON ({faults[0]['ctx']['error']} at byte {at}). Correct it and resend."
        )
    if kind == "missing" and not path:
        return "The request has no JSON body. Send one, with 'Content-Type: application/json'."
    if kind == "missing":
        return f"Missing required parameter: '{path}'."
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
    text = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def explain_http(error: HTTPException, route: str) -> TuneryError:
    """What the framework refuses by itself: an unknown route, a wrong method, a body over the limit."""
    if error.status_code == 413:
        return TooLarge(what="The request's body", limit=error.detail, instead="Send less at once.")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return RouteNotFound(what=f"Invalid method for URL ({route}). Use {allowed}.")
    if error.status_code == 404:
        return RouteNotFound(what=f"Invalid URL ({route}). /docs lists this server's routes.")
    return InvalidValue(reason=str(error.detail))
