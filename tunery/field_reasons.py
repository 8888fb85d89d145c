"""Words for what a validator requires, used in errors about requests and about rows."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import AfterValidator, WithJsonSchema

KINDS: Mapping[str, str] = {
    "string_type": "a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object in braces",
    "model_type": "an object in braces",
    "model_attributes_type": "an object in braces",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
}
_LIMITS: Mapping[str, str] = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def wanted(kind: str, context: Mapping[str, Any]) -> str | None:
    """Returns what a value must be that pydantic refused for the reason `kind`; None for other kinds."""
    if kind in _LIMITS:
        return _LIMITS[kind].format(**{name: bound(value) for name, value in context.items()})
    return KINDS.get(kind)


def bound(value: Any) -> str:
    """Formats a limit, whole ones without a fraction: pydantic gives 1.0 for a float field."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def formed(pattern: str, form: str) -> tuple[AfterValidator, WithJsonSchema]:
    """Returns the annotations of a string that matches the whole `pattern`; `form` says what it should be in words.

    Why not `Field(pattern=...)`: its error would show the pattern, from which most users cannot tell what to write.
    """

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"should be {form}")
        return text

    return AfterValidator(check), WithJsonSchema({"type": "string", "pattern": f"^({pattern})$"})
