"""Words for what a validator requires, used in errors about requests and about rows."""

from collections.abc import Mapping
from typing import Any

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
