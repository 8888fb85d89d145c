"""Words a validator's errors for people: what is wrong with a value, and what it must be."""

import json
from typing import Any

from pydantic_core import ErrorDetails

from tunery import field_reasons
from tunery.rows import keys, strict_json

_SHOWN = 60
_OTHERS = {
    "too_short": "must not be empty.",
    "string_too_short": "must not be empty.",
    "string_pattern_mismatch": "must have the form {pattern}.",
}


_ROLES = "system, developer, user, assistant or tool"
_ROLE_MISSING = f"Discriminator 'role' is missing in value. Give the message a role: {_ROLES}."


def _unknown_role(role: object) -> str:
    return f"has the unknown role {shown(role)}. Use {_ROLES}."


def locate(error: ErrorDetails) -> tuple[str, str]:
    """Returns where in the row, and what is wrong: (", message 2", "Discriminator 'role' is missing in value. ...")."""
    steps = list(error["loc"])
    where = ""
    while len(steps) > 1 and isinstance(steps[1], int):
        where += f", {str(steps[0]).removesuffix('s')} {steps[1] + 1}"
        steps = steps[2:]
    field = ".".join(str(step) for step in steps)
    if field == "role" and where:
        return where, _ROLE_MISSING if error["type"] == "missing" else _unknown_role(error["input"])
    reason = _describe_field(error, field)
    # Errors about a whole object come without its name: "has no 'content'".
    return where, f"'{field}' {reason}" if field and not reason.startswith("has ") else reason


def _describe_field(error: ErrorDetails, field: str) -> str:
    if error["type"] == "missing":
        return f"has no '{field}'."
    if error["type"] == "extra_forbidden":
        return f"has the unknown key '{field}'. {keys.hint(field)}"
    return describe(error)


def describe(error: ErrorDetails) -> str:
    """Returns the error as the end of a sentence that begins with the value's name: "must be a string, ..."."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "refused":
        return error["msg"]
    if kind == "literal_error":
        expected = str(context["expected"]).replace("'", '"')
        return f"is {shown(value)}; only {expected} is supported here."
    if kind in field_reasons.KINDS:
        return f"must be {field_reasons.KINDS[kind]}, not {found(value)}."
    if wanted := field_reasons.wanted(kind, context):
        return f"must be {wanted}."
    if kind in _OTHERS:
        return _OTHERS[kind].format(**context)
    return f"cannot be {shown(value)}."


def found(value: Any) -> str:
    """Returns the kind of a value, or a short string or number itself."""
    if isinstance(value, str | int | float) and not isinstance(value, bool) and len(text := shown(value)) <= 20:
        return text
    return strict_json.kind(value)


def shown(value: Any) -> str:
    """Returns a value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
