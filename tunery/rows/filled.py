"""Drops the nulls of tools and calls that a table's export has filled in.

In a table all records of a column have the members of each, so a call also has the arguments of the other functions, as
nulls, and a tool their properties. A model would learn to write these nulls.
"""

from typing import Any

_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords of JSON Schema whose members are names."""
_VALUES = frozenset({"default", "const", "enum", "examples"})
"""Keywords that may have any value, also null."""


def clean_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns a JSON Schema without members that are null though no value of theirs can be."""
    return {key: _clean(key, value) for key, value in schema.items() if value is not None or key in _VALUES}


def _clean(key: str, value: Any) -> Any:
    if key in _VALUES:
        return value
    if key in _NAMED and isinstance(value, dict):
        return {name: _clean("", item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_clean("", item) for item in value]
    return clean_schema(value) if isinstance(value, dict) else value


def clean_calls(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row or a pair without null arguments that the called function, one of the row's tools,
    does not have. Arguments and tools in strings are not touched, as no export fills those."""
    tools = fields.get("tools")
    schemas = dict(filter(None, map(_schema, _objects(tools)))) if tools else None
    if not schemas:
        return fields
    cleaned = dict(fields)
    if isinstance(messages := fields.get("messages"), list):
        cleaned["messages"] = [_with_clean_calls(message, schemas) for message in messages]
    if (other := fields.get("dispreferred")) is not None:
        cleaned["dispreferred"] = _with_clean_calls(other, schemas)
    return cleaned


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _schema(tool: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Returns a tool's name and the schema of its arguments; None if it has no such schema."""
    function = tool["function"] if isinstance(tool.get("function"), dict) else tool
    name, schema = function.get("name"), function.get("parameters")
    return (name, clean_schema(schema)) if isinstance(name, str) and isinstance(schema, dict) else None


def _with_clean_calls(message: Any, schemas: dict[str, dict[str, Any]]) -> Any:
    if not isinstance(message, dict) or not isinstance(calls := message.get("tool_calls"), list):
        return message
    return {**message, "tool_calls": [_clean_call(call, schemas) for call in calls]}


def _clean_call(call: Any, schemas: dict[str, dict[str, Any]]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments := function.get("arguments"), dict):
        return call
    schema = schemas.get(str(function.get("name")))
    if schema is None:
        return call
    return {**call, "function": {**function, "arguments": _clean_arguments(arguments, schema)}}


def _clean_arguments(arguments: dict[str, Any], schema: Any) -> dict[str, Any]:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return arguments
    return {
        key: _clean_arguments(value, properties.get(key)) if isinstance(value, dict) else value
        for key, value in arguments.items()
        if value is not None or key in properties
    }
